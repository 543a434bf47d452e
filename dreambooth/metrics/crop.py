"""How pictures are cut for the paper's judges."""

from __future__ import annotations

from PIL import Image

_LARGER = 256 / 224


def paper_crop(image: Image.Image, side: int) -> Image.Image:
    """The central square of `side` pixels of the picture in RGB, its shorter side brought to 8/7 of that, bicubic.

    At a side of 224 this is the evaluation transform of DINO's and of DreamBench's scores: resize 256, crop 224.
    """
    image = image.convert("RGB")
    shorter = round(side * _LARGER)
    scale = shorter / min(image.size)
    width, height = (max(shorter, round(length * scale)) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))
