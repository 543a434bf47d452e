"""Image files that tests make, and the folder of real photos."""

import os
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DREAMBENCH = Path(os.environ.get("DREAMBENCH_DIR", Path(__file__).parents[1] / "../shared/dreambench"))
needs_dreambench = pytest.mark.skipif(
    not DREAMBENCH.exists(), reason=f"needs DreamBench's photos, and there is no {DREAMBENCH}; set DREAMBENCH_DIR"
)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width: int = 96, height: int = 80, shift: int = 0) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, shift % 256)], -1).astype(np.uint8))


def photo(shift: int = 0) -> bytes:
    return encoded(gradient(shift=shift), "JPEG")


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def fill_folder(folder: Path, **files: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for stem, data in files.items():
        (folder / stem.replace("__", ".")).write_bytes(data)
    return folder
