"""Crops: how photos are shown in training, in the terms of SDXL's micro-conditioning.

A view mirrors a photo or not, scales it to cover its bucket, and cuts the bucket's size out of it. Podell et al. 2023,
section 2.2 and 2.3: the U-Net is told the photo's original size, the corner of the cut within the scaled photo, and the
size of the bucket. As in diffusers' own training the photo is mirrored first, so the corner is that of the cut as seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageOps

from dreambooth.common.streams import Key, integer

CROPS = 8
"""Views of each photo under random crops: all are encoded before training."""
_MOST_UNEQUAL = 2
"""The largest ratio of a bucket's sides."""

Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclass(frozen=True)
class View:
    """One way of showing a photo in training, in pixels; `corner` is (top, left) within the scaled photo."""

    original: Size
    scaled: Size
    corner: tuple[int, int]
    bucket: Size
    mirrored: bool = False

    def show(self, photo: Image.Image) -> Image.Image:
        """The picture, of the bucket's size (Lanczos, antialiased)."""
        height, width = self.scaled
        # The box does both in one pass: scaling a long panorama whole could take gigabytes.
        (top, left), (rows, columns) = self.corner, self.bucket
        box = (
            left * photo.width / width,
            top * photo.height / height,
            (left + columns) * photo.width / width,
            (top + rows) * photo.height / height,
        )
        seen = ImageOps.mirror(photo) if self.mirrored else photo
        return seen.resize((columns, rows), Image.Resampling.LANCZOS, box=box)


def centre_view(original: Size, bucket: Size) -> View:
    """The view that covers `bucket` with as much of the photo as it holds, cut from the middle."""
    (height, width), (rows, columns) = original, bucket
    if height * columns < width * rows:
        scaled = (rows, round(width * rows / height))
    else:
        scaled = (round(height * columns / width), columns)
    return View(original, scaled, ((scaled[0] - rows) // 2, (scaled[1] - columns) // 2), bucket)


def views(original: Size, bucket: Size, *key: Key, count: int, flip: bool, random_crop: bool) -> list[View]:
    """`count` views: with `flip` every second one is mirrored, with `random_crop` their corners are drawn by `key`."""
    centre = centre_view(original, bucket)
    made = []
    for number in range(count):
        corner = centre.corner
        if random_crop:
            room = zip(centre.scaled, bucket, ("top", "left"), strict=True)
            top, left = (integer(whole - cut + 1, *key, number, side) for whole, cut, side in room)
            corner = (top, left)
        made.append(View(original, centre.scaled, corner, bucket, mirrored=flip and number % 2 == 1))
    return made


def view_count(flip: bool, random_crop: bool) -> int:
    """How many views of a photo these options take."""
    return CROPS if random_crop else 2 if flip else 1


def bucket_sizes(resolution: int, multiple: int) -> list[Size]:
    """The sizes of aspect-ratio buckets: at most `resolution` squared pixels, sides from 1:2 to 2:1.

    Sides are multiples of `multiple`, in steps of about a 16th of the resolution: SDXL's are multiples of 64, as in its
    own training. The square comes first.
    """
    step = multiple * max(1, resolution // (16 * multiple))
    buckets = [(resolution, resolution)]
    for short in range(resolution // step * step, 0, -step):
        long = resolution**2 // short // step * step
        if short < long <= _MOST_UNEQUAL * short:
            buckets += [(short, long), (long, short)]
    return buckets


def nearest_bucket(original: Size, buckets: Sequence[Size]) -> Size:
    """The bucket whose ratio of sides is nearest to the photo's."""
    height, width = original
    return min(buckets, key=lambda bucket: abs(math.log(bucket[0] * width / (bucket[1] * height))))
