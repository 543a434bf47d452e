"""Backgrounds: one painter for each context, and the plain studio that stands behind captions without a context.

A painter draws on a square RGBA canvas with a seeded generator and says where the subject stands. Coordinates are in
units of the canvas side, y downwards.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

Props = dict[str, list[Image.Image]]
Colour = tuple[int, int, int]


class Stage(NamedTuple):
    """Where the subject goes: the height of its feet, whether a shadow falls, and what laps over it afterwards."""

    feet: float
    shadow: bool = True
    sink: Colour | None = None
    reflect: bool = False


class Brush:
    """Drawing in units of the canvas side, with the seeded generator that all painters share."""

    def __init__(self, size: int, rng: np.random.Generator, props: Props) -> None:
        """A blank canvas of `size` pixels a side."""
        self.size, self.rng, self.props = size, rng, props
        self.image = Image.new("RGB", (size, size))
        self.draw = ImageDraw.Draw(self.image)

    def uniform(self, low: float, high: float) -> float:
        """One number between low and high."""
        return float(self.rng.uniform(low, high))

    def vary(self, colour: Colour, by: int = 12) -> Colour:
        """The colour, a little lighter, darker and shifted."""
        noise = self.rng.integers(-by, by + 1) + self.rng.integers(-by // 3, by // 3 + 1, 3)
        r, g, b = np.clip(np.array(colour) + noise, 0, 255).tolist()
        return r, g, b

    def band(self, top: float, bottom: float, upper: Colour, lower: Colour | None = None) -> None:
        """A full-width band, shaded from one colour to another."""
        y0, y1 = round(top * self.size), round(bottom * self.size)
        ramp = np.linspace(0, 1, max(y1 - y0, 1))[:, None, None]
        rows = np.array(upper) * (1 - ramp) + np.array(lower or upper) * ramp
        strip = np.broadcast_to(rows, (max(y1 - y0, 1), self.size, 3)).astype(np.uint8)
        self.image.paste(Image.fromarray(np.ascontiguousarray(strip)), (0, y0))

    def polygon(self, points: list[tuple[float, float]], fill: Colour) -> None:
        """A filled polygon."""
        self.draw.polygon([(x * self.size, y * self.size) for x, y in points], fill=fill)

    def oval(self, x: float, y: float, rx: float, ry: float, fill: Colour) -> None:
        """A filled ellipse about its centre."""
        s = self.size
        self.draw.ellipse(((x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s), fill=fill)

    def line(self, points: list[tuple[float, float]], fill: Colour, width: float) -> None:
        """A polyline of a width in canvas units."""
        self.draw.line(
            [(x * self.size, y * self.size) for x, y in points], fill=fill, width=max(1, round(width * self.size))
        )

    def prop(self, name: str, x: float, feet: float, height: float) -> None:
        """One of a prop's drawings, standing at (x, feet)."""
        choices = self.props[name]
        picture = choices[int(self.rng.integers(len(choices)))]
        side = max(2, round(height * self.size))
        picture = picture.resize((side, side), Image.Resampling.BILINEAR)
        self.image.paste(picture, (round(x * self.size - side / 2), round(feet * self.size - side)), picture)

    def sky(self, horizon: float) -> None:
        """A clear sky down to the horizon."""
        self.band(0, horizon, self.vary((120, 190, 245), 14), self.vary((205, 232, 250), 8))


def plain(b: Brush) -> Stage:
    """A studio: one soft colour."""
    base = np.array(b.rng.choice([(245, 245, 247), (225, 228, 235), (240, 228, 210), (215, 232, 240), (228, 240, 222)]))
    r, g, bl = np.clip(base + b.rng.integers(-8, 9, 3), 0, 255).tolist()
    b.band(0, 1, (r, g, bl), (max(r - 14, 0), max(g - 14, 0), max(bl - 14, 0)))
    return Stage(b.uniform(0.82, 0.92), shadow=bool(b.rng.random() < 0.6))


def jungle(b: Brush) -> Stage:
    """Dense dark green leaves, palms, a dim floor."""
    b.band(0, 1, b.vary((30, 92, 40)), b.vary((14, 52, 24)))
    for _ in range(26):
        x, y, turn = b.uniform(0, 1), b.uniform(-0.05, 0.8), b.uniform(0, math.pi)
        length, wide = b.uniform(0.12, 0.26), b.uniform(0.025, 0.05)
        dx, dy = math.cos(turn), math.sin(turn)
        tips = [(x - dx * length / 2, y - dy * length / 2), (x + dx * length / 2, y + dy * length / 2)]
        sides = [(x - dy * wide, y + dx * wide), (x + dy * wide, y - dx * wide)]
        b.polygon([tips[0], sides[0], tips[1], sides[1]], b.vary((38, 128, 52), 28))
    for x in (b.uniform(0.0, 0.2), b.uniform(0.8, 1.0)):
        b.prop("palm", x, b.uniform(0.7, 0.9), b.uniform(0.45, 0.65))
    b.band(0.86, 1, b.vary((40, 62, 26), 8))
    return Stage(b.uniform(0.88, 0.94), shadow=False)


def snow(b: Brush) -> Stage:
    """White drifts, firs and falling flakes under a pale sky."""
    b.band(0, 0.6, b.vary((165, 190, 215)), b.vary((215, 228, 240), 6))
    for x in (b.uniform(0.02, 0.2), b.uniform(0.8, 0.98)):
        b.prop("evergreen", x, b.uniform(0.58, 0.68), b.uniform(0.3, 0.45))
    b.oval(b.uniform(0.1, 0.4), 0.95, 0.8, 0.42, b.vary((238, 244, 250), 4))
    b.oval(b.uniform(0.6, 0.9), 0.98, 0.8, 0.4, b.vary((246, 250, 254), 3))
    b.band(0.82, 1, (247, 250, 254), (232, 240, 248))
    for _ in range(22):
        b.oval(b.uniform(0, 1), b.uniform(0, 0.75), 0.012, 0.012, (255, 255, 255))
    return Stage(b.uniform(0.82, 0.92))


def beach(b: Brush) -> Stage:
    """Sky, sea and sand, sometimes a palm."""
    horizon = b.uniform(0.35, 0.48)
    b.sky(horizon)
    b.band(horizon, 0.64, b.vary((38, 140, 200)), b.vary((90, 200, 220)))
    b.band(0.64, 0.66, (235, 248, 250))
    b.band(0.66, 1, b.vary((240, 216, 160), 8), b.vary((226, 194, 132), 8))
    if b.rng.random() < 0.6:
        b.prop("palm", b.uniform(0.02, 0.15) if b.rng.random() < 0.5 else b.uniform(0.85, 0.98), 0.72, 0.5)
    return Stage(b.uniform(0.84, 0.92))


def cobblestone(b: Brush) -> Stage:
    """A street of round grey stones before a wall of houses."""
    for i, x in enumerate(np.arange(-0.1, 1.0, 0.3)):
        wall = b.vary([(196, 150, 120), (205, 185, 150), (170, 130, 110)][i % 3])
        b.polygon([(x, 0), (x + 0.3, 0), (x + 0.3, 0.46), (x, 0.46)], wall)
        for wy in (0.06, 0.25):
            b.polygon([(x + 0.1, wy), (x + 0.2, wy), (x + 0.2, wy + 0.11), (x + 0.1, wy + 0.11)], (95, 105, 120))
    b.band(0.45, 1, (88, 86, 88))
    y, tall = 0.47, 0.035
    row = 0
    while y < 1.05:
        wide = tall * 1.6
        for x in np.arange(-wide * (row % 2) * 0.5, 1 + wide, wide):
            b.oval(float(x), y + tall / 2, wide * 0.46, tall * 0.46, b.vary((158, 156, 154), 18))
        y, tall, row = y + tall, tall * 1.18, row + 1
    return Stage(b.uniform(0.84, 0.93))


def fabric(b: Brush) -> Stage:
    """Pink cloth in soft folds."""
    size = b.size
    y, x = np.mgrid[0:size, 0:size] / size
    angle = b.uniform(-0.9, 0.9)
    fold = np.sin(
        (x * math.cos(angle) + y * math.sin(angle)) * b.uniform(14, 22) + 1.5 * np.sin(y * 5 + b.uniform(0, 6))
    )
    base = np.array(b.vary((240, 130, 180), 10))
    b.image.paste(Image.fromarray(np.clip(base + 18 * fold[..., None], 0, 255).astype(np.uint8)), (0, 0))
    return Stage(b.uniform(0.8, 0.92))


def wood(b: Brush) -> Stage:
    """Brown floor boards below a cream wall."""
    top = b.uniform(0.18, 0.4)
    b.band(0, top, b.vary((236, 226, 208), 8))
    b.band(top - 0.03, top, (250, 248, 242))
    base = b.vary((166, 112, 64), 12)
    b.band(top, 1, base)
    edges = [-0.9, -0.45, -0.1, 0.2, 0.5, 0.8, 1.1, 1.45, 1.9]
    for left, right in pairwise(edges):
        points = [(0.5 + (left - 0.5) * 0.5, top), (0.5 + (right - 0.5) * 0.5, top), (right, 1.01), (left, 1.01)]
        b.polygon(points, b.vary(base, 12))
    for edge in edges:
        b.line([(0.5 + (edge - 0.5) * 0.5, top), (edge, 1.0)], (104, 66, 34), 0.012)
    return Stage(b.uniform(0.84, 0.93))


def city(b: Brush) -> Stage:
    """A skyline of towers with lit windows behind a grey road."""
    b.sky(0.7)
    x = -0.05
    while x < 1.0:
        wide, tall = b.uniform(0.12, 0.2), b.uniform(0.3, 0.6)
        tower = b.vary((100, 115, 145), 25)
        b.polygon([(x, 0.7 - tall), (x + wide, 0.7 - tall), (x + wide, 0.72), (x, 0.72)], tower)
        for wy in np.arange(0.74 - tall, 0.66, 0.075):
            for wx in np.arange(x + 0.025, x + wide - 0.03, 0.05):
                b.polygon([(wx, wy), (wx + 0.022, wy), (wx + 0.022, wy + 0.032), (wx, wy + 0.032)], (245, 225, 140))
        x += wide + 0.008
    b.band(0.7, 1, b.vary((120, 122, 128), 8), b.vary((100, 102, 108), 6))
    b.band(0.7, 0.72, (190, 190, 192))
    return Stage(b.uniform(0.86, 0.93))


def mountain(b: Brush) -> Stage:
    """Snow-capped peaks over a green meadow."""
    b.sky(0.68)
    for centre in (b.uniform(0.05, 0.3), b.uniform(0.7, 0.95), b.uniform(0.4, 0.6)):
        peak, half = b.uniform(0.08, 0.22), b.uniform(0.35, 0.48)
        slope = (0.7 - peak) / half
        b.polygon([(centre - half, 0.7), (centre, peak), (centre + half, 0.7)], b.vary((112, 118, 138), 14))
        cap = 0.15
        w = cap / slope
        points = [
            (centre - w, peak + cap),
            (centre, peak),
            (centre + w, peak + cap),
            (centre + w / 3, peak + cap * 0.7),
        ]
        b.polygon([*points, (centre - w / 4, peak + cap * 1.1)], (248, 250, 253))
    b.band(0.68, 1, b.vary((110, 175, 80), 10), b.vary((84, 145, 62), 8))
    return Stage(b.uniform(0.85, 0.93))


def house(b: Brush) -> Stage:
    """A blue house with a white door on a lawn."""
    b.sky(0.68)
    b.band(0.68, 1, b.vary((126, 190, 92), 10), b.vary((98, 160, 72), 8))
    x, wide = b.uniform(0.0, 0.35), b.uniform(0.55, 0.7)
    top, roof = b.uniform(0.3, 0.36), b.uniform(0.04, 0.12)
    b.polygon([(x - 0.06, top), (x + wide / 2, roof), (x + wide + 0.06, top)], b.vary((70, 74, 96), 8))
    b.polygon([(x, top), (x + wide, top), (x + wide, 0.72), (x, 0.72)], b.vary((58, 120, 220), 12))
    for wx in (x + 0.06, x + wide - 0.18):
        b.polygon(
            [(wx, top + 0.06), (wx + 0.12, top + 0.06), (wx + 0.12, top + 0.18), (wx, top + 0.18)], (250, 246, 225)
        )
    door = x + wide / 2
    b.polygon([(door - 0.06, 0.5), (door + 0.06, 0.5), (door + 0.06, 0.72), (door - 0.06, 0.72)], (245, 245, 245))
    return Stage(b.uniform(0.86, 0.94))


def forest_rug(b: Brush) -> Stage:
    """A purple rug on the floor of a fir forest."""
    b.band(0, 0.65, b.vary((150, 190, 150), 10), b.vary((92, 140, 92), 10))
    for i, x in enumerate(np.linspace(0.02, 0.98, 6)):
        b.prop("evergreen", float(x) + b.uniform(-0.04, 0.04), 0.62 + 0.05 * (i % 2), b.uniform(0.5, 0.7))
    b.band(0.66, 1, b.vary((84, 104, 52), 8), b.vary((70, 84, 42), 6))
    rug = b.vary((135, 62, 170), 12)
    b.oval(0.5, 0.86, 0.46, 0.125, (225, 190, 90))
    b.oval(0.5, 0.86, 0.435, 0.105, rug)
    b.oval(0.5, 0.86, 0.3, 0.065, b.vary((160, 92, 195), 8))
    return Stage(b.uniform(0.86, 0.9), shadow=False)


def wheat(b: Brush) -> Stage:
    """A golden field of ears of wheat under the sky."""
    b.sky(0.46)
    b.band(0.42, 1, b.vary((232, 190, 84), 8), b.vary((200, 150, 52), 8))
    for _ in range(46):
        x, y, tall = b.uniform(0, 1), b.uniform(0.45, 1.0), b.uniform(0.12, 0.2)
        lean = b.uniform(-0.02, 0.02)
        b.line([(x, y), (x + lean, y - tall)], (178, 132, 44), 0.008)
        b.oval(x + lean, y - tall, 0.014, 0.045, b.vary((246, 212, 110), 10))
    return Stage(b.uniform(0.88, 0.95), shadow=False)


def autumn(b: Brush) -> Stage:
    """A tree in orange leaf, and leaves on the ground."""
    b.sky(0.64)
    b.band(0.62, 1, b.vary((176, 142, 78), 8), b.vary((150, 112, 58), 8))
    x = b.uniform(0.08, 0.24) if b.rng.random() < 0.5 else b.uniform(0.76, 0.92)
    b.line([(x, 0.2), (x, 0.72)], (94, 62, 40), 0.07)
    for _ in range(16):
        fill = b.vary([(226, 112, 32), (205, 70, 34), (240, 168, 44)][int(b.rng.integers(3))])
        b.oval(x + b.uniform(-0.22, 0.22), 0.2 + b.uniform(-0.2, 0.16), 0.1, 0.09, fill)
    for _ in range(9):
        b.prop("leaf", b.uniform(0, 1), b.uniform(0.75, 1.02), 0.11)
    return Stage(b.uniform(0.84, 0.92))


def eiffel(b: Brush) -> Stage:
    """The Eiffel Tower over a park."""
    b.sky(0.72)
    x, dark = (b.uniform(0.15, 0.35) if b.rng.random() < 0.5 else b.uniform(0.65, 0.85)), b.vary((98, 78, 66), 8)
    left = [(x - 0.012, 0.03), (x - 0.03, 0.25), (x - 0.07, 0.45), (x - 0.19, 0.74)]
    right = [(2 * x - px, py) for px, py in reversed(left)]
    b.polygon([*left, *right], dark)
    pale = b.image.getpixel((0, round(0.6 * b.size)))
    assert isinstance(pale, tuple)
    arch = [(x + 0.105 * math.cos(t), 0.745 - 0.15 * math.sin(t)) for t in np.linspace(0, math.pi, 12)]
    b.polygon(arch, (pale[0], pale[1], pale[2]))
    b.polygon([(x - 0.018, 0.31), (x + 0.018, 0.31), (x + 0.032, 0.41), (x - 0.032, 0.41)], (pale[0], pale[1], pale[2]))
    for y, half in ((0.27, 0.055), (0.45, 0.1), (0.57, 0.145)):
        b.line([(x - half, y), (x + half, y)], dark, 0.025)
    b.band(0.72, 1, b.vary((118, 180, 88), 10), b.vary((92, 150, 68), 8))
    return Stage(b.uniform(0.86, 0.93))


def water(b: Brush) -> Stage:
    """Open blue water with ripples."""
    horizon = b.uniform(0.25, 0.38)
    b.sky(horizon)
    b.band(horizon, 1, b.vary((50, 130, 205), 10), b.vary((22, 88, 165), 10))
    for _ in range(20):
        x, y = b.uniform(0, 1), b.uniform(horizon + 0.04, 0.98)
        b.line([(x, y), (x + b.uniform(0.08, 0.16), y)], b.vary((130, 195, 238), 8), 0.014)
    return Stage(b.uniform(0.8, 0.88), shadow=False, sink=b.vary((34, 105, 185), 6))


def milk(b: Brush) -> Stage:
    """White waves of milk under a warm sky."""
    b.band(0, 0.42, b.vary((250, 208, 170), 8), b.vary((252, 232, 208), 6))
    b.band(0.42, 1, (250, 247, 240), (240, 234, 224))
    for y in np.arange(0.42, 1.0, 0.12):
        for x in np.arange(-0.1 + b.uniform(0, 0.15), 1.2, 0.22):
            b.oval(float(x), float(y) + 0.04, 0.13, 0.05, (226, 218, 206))
            b.oval(float(x), float(y) + 0.055, 0.13, 0.05, (252, 249, 243))
    return Stage(b.uniform(0.8, 0.88), shadow=False, sink=(250, 246, 238))


def sunflowers(b: Brush) -> Stage:
    """Bright grass with sunflowers on all sides."""
    horizon = b.uniform(0.2, 0.34)
    b.sky(horizon)
    b.band(horizon, 1, b.vary((96, 190, 66), 10), b.vary((66, 150, 46), 10))
    for x, y in ((0.08, 0.6), (0.92, 0.6), (0.06, 0.98), (0.94, 0.98), (0.3, 0.46), (0.7, 0.46)):
        b.prop("sunflower", x + b.uniform(-0.04, 0.04), y + b.uniform(-0.04, 0.02), b.uniform(0.22, 0.3))
    return Stage(b.uniform(0.84, 0.92))


def mirror(b: Brush) -> Stage:
    """A mirror in a gilt frame lying flat, and what stands on it seen twice."""
    b.band(0, 1, b.vary((176, 160, 150), 8), b.vary((150, 134, 126), 8))
    b.polygon([(0.14, 0.56), (0.86, 0.56), (1.02, 1.0), (-0.02, 1.0)], (212, 170, 70))
    b.polygon([(0.17, 0.585), (0.83, 0.585), (0.97, 0.985), (0.03, 0.985)], b.vary((196, 222, 236), 6))
    for x in (0.28, 0.62):
        b.polygon([(x, 0.6), (x + 0.06, 0.6), (x - 0.02, 0.97), (x - 0.1, 0.97)], (224, 240, 248))
    return Stage(b.uniform(0.68, 0.74), shadow=False, reflect=True)


def sidewalk(b: Brush) -> Stage:
    """Pale paving slabs before a crowd."""
    b.band(0, 0.62, b.vary((196, 176, 160), 10), b.vary((170, 150, 138), 8))
    for x in np.arange(0.02, 1.05, 0.135):
        b.prop("person", float(x) + b.uniform(-0.03, 0.03), b.uniform(0.54, 0.62), b.uniform(0.34, 0.44))
    b.band(0.62, 1, b.vary((186, 186, 186), 8), b.vary((170, 170, 172), 6))
    b.band(0.61, 0.635, (130, 130, 132))
    for x in (-0.6, -0.15, 0.3, 0.7, 1.15, 1.6):
        b.line([(0.5 + (x - 0.5) * 0.55, 0.63), (x, 1.0)], (140, 140, 142), 0.012)
    b.line([(0, 0.78), (1, 0.78)], (140, 140, 142), 0.012)
    return Stage(b.uniform(0.86, 0.94))


def dirt(b: Brush) -> Stage:
    """A brown track through green verges."""
    horizon = b.uniform(0.32, 0.42)
    b.sky(horizon)
    b.band(horizon, 1, b.vary((120, 165, 78), 10), b.vary((92, 135, 58), 8))
    b.polygon([(0.44, horizon), (0.56, horizon), (1.0, 1.0), (0.0, 1.0)], b.vary((156, 110, 68), 10))
    for side in (-1, 1):
        b.line([(0.5 + side * 0.02, horizon), (0.5 + side * 0.24, 1.0)], (124, 84, 50), 0.03)
    return Stage(b.uniform(0.86, 0.94))


def white_rug(b: Brush) -> Stage:
    """A white fringed rug on a dark floor."""
    b.band(0, 0.45, b.vary((150, 172, 178), 10))
    b.band(0.45, 1, b.vary((98, 70, 56), 8), b.vary((78, 54, 42), 6))
    for x in np.linspace(0.03, 0.97, 26):
        b.line([(float(x), 0.7), (0.5 + (float(x) - 0.5) * 1.06, 0.99)], (236, 232, 222), 0.016)
    b.polygon([(0.12, 0.64), (0.88, 0.64), (0.99, 0.965), (0.01, 0.965)], b.vary((247, 245, 240), 3))
    b.line([(0.14, 0.68), (0.86, 0.68)], (222, 218, 208), 0.01)
    b.line([(0.06, 0.93), (0.94, 0.93)], (222, 218, 208), 0.01)
    return Stage(b.uniform(0.85, 0.9))


def night(b: Brush) -> Stage:
    """Stars and a moon over dark hills."""
    b.band(0, 0.75, b.vary((14, 16, 54), 5), b.vary((34, 36, 92), 6))
    for _ in range(16):
        b.oval(b.uniform(0, 1), b.uniform(0, 0.6), 0.012, 0.012, (245, 240, 205))
    b.oval(b.uniform(0.1, 0.3) if b.rng.random() < 0.5 else b.uniform(0.7, 0.9), 0.16, 0.08, 0.08, (250, 240, 195))
    b.band(0.74, 1, b.vary((24, 32, 48), 5), b.vary((16, 22, 36), 4))
    return Stage(b.uniform(0.86, 0.93), shadow=False)


PAINTERS: dict[str | None, Callable[[Brush], Stage]] = {
    None: plain,
    "jungle": jungle,
    "snow": snow,
    "beach": beach,
    "cobblestone": cobblestone,
    "fabric": fabric,
    "wood": wood,
    "city": city,
    "mountain": mountain,
    "house": house,
    "forest rug": forest_rug,
    "wheat": wheat,
    "autumn": autumn,
    "eiffel": eiffel,
    "water": water,
    "milk": milk,
    "sunflowers": sunflowers,
    "mirror": mirror,
    "sidewalk": sidewalk,
    "dirt": dirt,
    "white rug": white_rug,
    "night": night,
}
