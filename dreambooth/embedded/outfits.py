"""Accessories: hats, scarves and outfits put on an individual, fitted to where its drawing has its head."""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from dreambooth.embedded.instances import hsv_to_rgb, recolour

HEADROOM = 0.32
"""Free space added above the drawing for a hat, as a share of its height."""


class Head(NamedTuple):
    """A head in pixels: centre column, top row, width, and height down to the chin."""

    x: float
    top: float
    width: float
    height: float


def find_head(alpha: np.ndarray) -> Head:
    """Where a drawing of alpha (H, W) has its head."""
    solid = alpha > 0.5
    rows = np.flatnonzero(solid.any(1))
    top, tall = int(rows[0]), len(rows)
    # Tails and ears may stand higher than the head; the widest run of columns in the upper third is the head.
    edges = np.flatnonzero(np.diff(np.pad(solid[top + tall // 8 : top + tall // 3].any(0), 1).astype(int)))
    runs = [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
    left, right = max(runs, key=lambda run: run[1] - run[0])
    width = right - left
    wide_rows = np.flatnonzero(solid[:, left:right].sum(1) > 0.3 * width)
    top, tall = int(wide_rows[0]), int(rows[-1]) + 1 - int(wide_rows[0])
    is_face = width > 0.62 * tall
    return Head((left + right - 1) / 2, top, width, tall if is_face else min(tall, 1.1 * width))


def dress(pixels: np.ndarray, accessory: str) -> np.ndarray:
    """The individual, float RGBA (H, W, 4), wearing one of `ACCESSORIES`; the result is `HEADROOM` taller."""
    height, width = pixels.shape[:2]
    room = round(HEADROOM * height)
    body = np.concatenate([np.zeros((room, width, 4), np.float32), pixels])
    head = find_head(body[..., 3])
    if accessory in _CLOTHES:
        body = _clothe(body, head, *_CLOTHES[accessory])
    image = Image.fromarray((np.clip(body, 0, 1) * 255).astype(np.uint8), "RGBA")
    pen = ImageDraw.Draw(image)
    x, top, wide, tall = head

    def at(dx: float, dy: float) -> tuple[float, float]:
        return x + dx * wide, top + dy * wide

    brow = 0.2 * min(1.0, tall / wide)
    if accessory == "red hat":
        pen.pieslice((*at(-0.36, brow - 0.42), *at(0.36, brow + 0.3)), 180, 360, fill=(222, 26, 34))
        pen.rectangle((*at(-0.56, brow - 0.1), *at(0.36, brow)), fill=(170, 14, 24))
    elif accessory in ("santa hat", "wizard"):
        fill = (214, 24, 34) if accessory == "santa hat" else (104, 40, 160)
        tip = at(0.25 if accessory == "santa hat" else 0.05, brow - 0.62)
        pen.polygon([at(-0.4, brow), tip, at(0.4, brow)], fill=fill)
        if accessory == "santa hat":
            pen.rounded_rectangle((*at(-0.46, brow - 0.1), *at(0.46, brow + 0.06)), wide * 0.07, fill=(252, 252, 252))
            _dot(pen, tip, wide * 0.1, (252, 252, 252))
        else:
            pen.ellipse((*at(-0.6, brow - 0.09), *at(0.6, brow + 0.07)), fill=(84, 28, 138))
            for dx, dy in ((-0.08, -0.16), (0.12, -0.12), (0.03, -0.34)):
                _dot(pen, at(dx, brow + dy), wide * 0.045, (250, 215, 80))
    elif accessory == "top hat":
        pen.rectangle((*at(-0.3, brow - 0.55), *at(0.3, brow)), fill=(24, 24, 28))
        pen.rectangle((*at(-0.3, brow - 0.16), *at(0.3, brow - 0.06)), fill=(120, 24, 30))
        pen.ellipse((*at(-0.52, brow - 0.06), *at(0.52, brow + 0.07)), fill=(24, 24, 28))
        eye = (x + 0.17 * wide, top + 0.47 * tall)
        _ring(pen, eye, wide * 0.13, (214, 170, 50), wide * 0.045)
    elif accessory == "chef":
        pen.rectangle((*at(-0.28, brow - 0.3), *at(0.28, brow)), fill=(250, 250, 250), outline=(205, 205, 212))
        for dx in (-0.22, 0.22, 0.0):
            _dot(pen, at(dx, brow - 0.36), wide * 0.2, (252, 252, 252))
    elif accessory == "firefighter":
        pen.pieslice((*at(-0.4, brow - 0.45), *at(0.4, brow + 0.35)), 180, 360, fill=(200, 30, 26))
        pen.ellipse((*at(-0.56, brow - 0.12), *at(0.56, brow + 0.05)), fill=(160, 18, 18))
        pen.polygon(
            [at(-0.12, brow - 0.1), at(-0.12, brow - 0.34), at(0.12, brow - 0.34), at(0.12, brow - 0.1)],
            fill=(250, 205, 60),
        )
    elif accessory == "police":
        pen.polygon([at(-0.34, brow), at(-0.5, brow - 0.3), at(0.5, brow - 0.3), at(0.34, brow)], fill=(28, 50, 120))
        pen.ellipse((*at(-0.36, brow - 0.08), *at(0.36, brow + 0.08)), fill=(16, 18, 34))
        _dot(pen, at(0, brow - 0.18), wide * 0.09, (245, 205, 70))
    elif accessory == "pink glasses":
        row = top + 0.45 * tall
        for side in (-0.2, 0.2):
            eye = (x + side * wide, row)
            _dot(pen, eye, wide * 0.15, (255, 190, 222))
            _ring(pen, eye, wide * 0.17, (240, 50, 150), wide * 0.06)
        pen.line(
            ((x - 0.06 * wide, row), (x + 0.06 * wide, row)), fill=(240, 50, 150), width=max(1, round(wide * 0.06))
        )
    elif accessory == "rainbow scarf":
        row = top + 0.86 * tall
        thick = 0.05 * wide
        for i, colour in enumerate(((228, 40, 40), (245, 150, 40), (250, 225, 60), (60, 180, 80), (60, 110, 225))):
            y = row + (i - 2) * thick
            pen.rounded_rectangle((x - 0.46 * wide, y, x + 0.46 * wide, y + thick), thick / 2, fill=colour)
            left = x + 0.16 * wide + i * thick
            pen.rectangle((left, row, left + thick, min(row + 0.34 * wide, image.height - 1)), fill=colour)
    return np.asarray(image, np.float32) / 255


# Clothes recolour what lies below the chin (on a face, its lower part): the colour, and whether buttons are sewn on.
_CLOTHES: dict[str, tuple[tuple[float, float, float], tuple[int, int, int] | None]] = {
    "yellow shirt": ((0.145, 0.9, 1.0), None),
    "chef": ((0.6, 0.02, 1.0), (40, 40, 48)),
    "firefighter": ((0.02, 0.85, 0.8), (250, 220, 70)),
    "police": ((0.62, 0.75, 0.5), (245, 205, 70)),
    "wizard": ((0.77, 0.72, 0.66), (250, 215, 80)),
}


def _clothe(
    body: np.ndarray, head: Head, hsv: tuple[float, float, float], button: tuple[int, int, int] | None
) -> np.ndarray:
    bottom = int(np.flatnonzero((body[..., 3] > 0.5).any(1))[-1])
    chin = min(head.top + 0.92 * head.height, head.top + 0.72 * (bottom - head.top))
    y = np.arange(body.shape[0])[:, None]
    cloth = np.clip((y - chin) / 3, 0, 1)[..., None] * 0.93
    light = 0.72 + 0.28 * recolour(body, "red")[..., :1]
    tone = hsv_to_rgb(*(np.array([channel], np.float32) for channel in hsv))
    out = body.copy()
    out[..., :3] = body[..., :3] * (1 - cloth) + tone * light * cloth
    if button:
        column, size = round(head.x), max(1, round(head.width * 0.05))
        for share in (0.3, 0.65):
            row = round(chin + share * (bottom - chin))
            out[row : row + size, column : column + size, :3] = np.array(button) / 255
    return out


def _dot(pen: ImageDraw.ImageDraw, at: tuple[float, float], r: float, fill: tuple[int, int, int]) -> None:
    pen.ellipse((at[0] - r, at[1] - r, at[0] + r, at[1] + r), fill=fill)


def _ring(pen: ImageDraw.ImageDraw, at: tuple[float, float], r: float, fill: tuple[int, int, int], w: float) -> None:
    pen.ellipse((at[0] - r, at[1] - r, at[0] + r, at[1] + r), outline=fill, width=max(1, round(w)))
