import contextlib
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from dreambooth.common.images import read_image
from tests.photo_files import encoded, gradient, photo, png_header

BAD = {
    "empty": (b"", "the file is empty"),
    "text": (b"these are my notes", "not an image"),
    "truncated jpeg": (photo()[:-300], "truncated or corrupt"),
    "truncated png": (encoded(gradient())[:150], "truncated or corrupt"),
    "header alone": (photo()[:24], "not an image|truncated or corrupt"),
    "bomb": (png_header(60_000, 60_000), "decompression bomb"),
    "small bomb": (png_header(10_000, 10_000), "decompression bomb"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64), "HEIC images .* convert it to JPEG"),
    "float": (encoded(Image.new("F", (64, 64), 0.5), "TIFF"), "floating-point"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("data", "reason"), BAD.values(), ids=BAD)
def test_a_bad_file_is_an_error_that_names_it(data, reason):
    with pytest.raises(ValueError, match=reason) as error:
        read_image(data, "holiday/dog.jpg")
    assert str(error.value).startswith("holiday/dog.jpg: ")


def test_a_bomb_warning_that_is_raised_is_the_same_error():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="decompression bomb"):
            read_image(png_header(10_000, 10_000), "dog.png")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = np.zeros((64, 96, 3), np.uint8)
    upright[:32, :48], upright[:32, 48:], upright[32:, :48] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = Image.fromarray(upright)
    if orientation in undo:
        stored = stored.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen = read_image(encoded(stored, exif=exif), "dog.png")
    np.testing.assert_array_equal(np.asarray(seen), upright)


def transparent_palette() -> bytes:
    image = Image.new("P", (64, 64), 1)
    image.putpalette([0, 0, 0, 200, 10, 20])
    image.paste(0, (0, 0, 64, 32))
    return encoded(image, transparency=0)


def grey_16_bit(kind: str) -> bytes:
    values = np.full((64, 64), 128 * 257, np.uint16)
    values[:32] = 65535
    return encoded(Image.fromarray(values), kind)


READS = {  # bytes, colour of the upper half, colour of the lower half
    "rgb": (encoded(Image.new("RGB", (64, 64), (9, 8, 7))), (9, 8, 7), (9, 8, 7)),
    "rgba": (encoded(Image.new("RGBA", (64, 64), (255, 0, 0, 0))), (255, 255, 255), (255, 255, 255)),
    "half transparent": (encoded(Image.new("RGBA", (64, 64), (0, 0, 0, 51))), (204,) * 3, (204,) * 3),
    "grey and alpha": (encoded(Image.new("LA", (64, 64), (0, 51))), (204,) * 3, (204,) * 3),
    "palette": (transparent_palette(), (255, 255, 255), (200, 10, 20)),
    "transparent colour": (
        encoded(Image.new("RGB", (64, 64), (1, 2, 3)), transparency=(1, 2, 3)),
        (255,) * 3,
        (255,) * 3,
    ),
    "grey": (encoded(Image.new("L", (64, 64), 77)), (77,) * 3, (77,) * 3),
    "1 bit": (encoded(Image.new("1", (64, 64), 1)), (255,) * 3, (255,) * 3),
    "16-bit png": (grey_16_bit("PNG"), (255,) * 3, (128,) * 3),
    "16-bit tiff": (grey_16_bit("TIFF"), (255,) * 3, (128,) * 3),
    "32-bit tiff": (encoded(Image.new("I", (64, 64), 100 * 257), "TIFF"), (100,) * 3, (100,) * 3),
    "cmyk jpeg": (encoded(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "JPEG"), (255, 0, 0), (255, 0, 0)),
    "cmyk tiff": (encoded(Image.new("CMYK", (64, 64), (0, 0, 0, 255)), "TIFF"), (0, 0, 0), (0, 0, 0)),
    "frames": (
        encoded(Image.new("RGB", (64, 64), "red"), "GIF", save_all=True, append_images=[Image.new("RGB", (64, 64))]),
        (255, 0, 0),
        (255, 0, 0),
    ),
    "broken profile": (encoded(Image.new("RGB", (64, 64), (9, 8, 7)), icc_profile=b"junk"), (9, 8, 7), (9, 8, 7)),
}


@pytest.mark.parametrize(("data", "upper", "lower"), READS.values(), ids=READS)
def test_every_kind_of_pixel_is_read_as_it_is_seen(data, upper, lower):
    image = read_image(data, "dog.png")
    assert image.mode == "RGB"
    np.testing.assert_allclose(np.asarray(image)[0, 0], upper, atol=2)
    np.testing.assert_allclose(np.asarray(image)[-1, -1], lower, atol=2)


def test_embedded_profiles_become_srgb():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    red_is_blue = srgb.replace(b"rXYZ", b"tmp ").replace(b"bXYZ", b"rXYZ").replace(b"tmp ", b"bXYZ")
    for profile, seen in ((srgb, (40, 90, 160)), (red_is_blue, (160, 90, 40))):
        data = encoded(Image.new("RGB", (64, 64), (40, 90, 160)), icc_profile=profile)
        np.testing.assert_allclose(np.asarray(read_image(data, "dog.png"))[0, 0], seen, atol=1)


@given(st.binary(max_size=400), st.integers(0, 2000))
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_give_an_image_or_a_value_error(noise, position):
    good = photo()
    with contextlib.suppress(ValueError):
        assert read_image(good[:position] + noise + good[position + len(noise) :], "dog.jpg").mode == "RGB"
