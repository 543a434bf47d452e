"""Image files: decoded as a viewer shows them, and encoded as PNG."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image, ImageCms, ImageOps

MAX_PIXELS = 89_478_485
"""The largest image that is decoded: the size from which Pillow warns of a decompression bomb."""


_SRGB = ImageCms.createProfile("sRGB")


_HEIC_BRANDS = {b"heic", b"heim", b"heis", b"heix", b"hevc", b"hevx", b"mif1", b"msf1"}


def read_image(data: bytes, name: str) -> Image.Image:
    """Decode a whole image file to RGB, as a viewer shows it.

    EXIF orientation is applied, transparency lies on white, embedded colour profiles are converted to sRGB, 16-bit grey
    is scaled to 8 bits, and a file of several frames gives its first.

    Args:
        data: the bytes of the file.
        name: what errors call it.

    Raises:
        ValueError: the file is empty, no image, truncated, or larger than `MAX_PIXELS`.
    """
    if not data:
        raise ValueError(f"{name}: the file is empty; copy it again or leave it out")
    bomb = f"{name}: more than {MAX_PIXELS / 1e6:.0f} megapixels, which may be a decompression bomb; make it smaller"
    try:
        image = Image.open(BytesIO(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(bomb) from error
    except Exception as error:  # on broken headers Pillow's plugins raise nearly anything
        if data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS:
            raise ValueError(f"{name}: HEIC images cannot be read here; convert it to JPEG or PNG") from error
        raise ValueError(
            f"{name}: not an image, or of a kind that cannot be read; convert it to JPEG or PNG"
        ) from error
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(bomb)
    try:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # as do its decoders
        raise ValueError(f"{name}: truncated or corrupt ({error}); copy it again or leave it out") from error


def png_bytes(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range; save it with 8 bits per channel")
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    profile = image.info.get("icc_profile")
    if profile and image.mode in ("RGB", "CMYK"):
        try:
            return ImageCms.profileToProfile(image, BytesIO(profile), _SRGB, outputMode="RGB") or image
        except ImageCms.PyCMSError:  # a broken profile: show the image without it, as viewers do
            pass
    return image.convert("RGB")
