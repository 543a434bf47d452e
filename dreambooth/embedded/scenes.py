"""Captioned scenes: a value that says everything about a picture, its exact caption, and the renderer.

A `Scene` is plain data drawn from a counter-based seed; `caption` and `render` are pure functions of it, so that any
scene can be made again, alone, at any size.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from dreambooth.embedded.backgrounds import PAINTERS, Brush, Props, Stage
from dreambooth.embedded.instances import Instance, draw_instance, recolour
from dreambooth.embedded.outfits import HEADROOM, dress
from dreambooth.embedded.vocabulary import (
    ACCESSORIES,
    COLOURS,
    CONTEXTS,
    MARKINGS,
    NOUNS,
    PROPERTIES,
    STYLES,
    UNFIT,
    VIEWS,
    is_held_out,
)


@dataclass(frozen=True)
class Scene:
    """One picture: an individual, where it is, how it looks there, and the seed of everything left to chance."""

    instance: Instance
    seed: int
    context: str | None = None
    colour: str | None = None
    look: str | None = None
    accessory: str | None = None
    style: str | None = None
    view: str | None = None
    says_marking: bool = False
    says_context: bool = True


@dataclass(frozen=True)
class Sprites:
    """The drawings of each noun by name, and the props of the backgrounds."""

    nouns: dict[str, dict[str, Image.Image]]
    props: Props

    @staticmethod
    def load(folder: Path, size: int = 128) -> Sprites:
        """Read the folder that the sprites stage of the build writes, at `size` pixels."""

        def read(path: Path) -> Image.Image:
            with Image.open(path) as file:
                picture = file.convert("RGBA")
            return picture if picture.width == size else picture.resize((size, size), Image.Resampling.LANCZOS)

        def pictures(kind: str) -> dict[str, dict[str, Image.Image]]:
            words = sorted((folder / kind).iterdir())
            return {w.name: {p.stem: read(p) for p in sorted(w.glob("*.png")) if p.stem not in UNFIT} for w in words}

        return Sprites(pictures("nouns"), {word: list(found.values()) for word, found in pictures("props").items()})

    def drawings(self, noun: str, held_out: bool = False) -> list[str]:
        """The names of a noun's drawings in pretraining, or of those kept out of it."""
        return [name for name in self.nouns[noun] if is_held_out(noun, name) == held_out]


def is_held_out_caption(scene: Scene) -> bool:
    """Whether the combination of noun with context or colour is one of the tenth that pretraining never shows."""
    noun = scene.instance.noun
    pairs = [f"{noun} {word}" for word in (scene.context, scene.colour) if word is not None]
    return any(hashlib.sha256(pair.encode()).digest()[0] % 10 == 0 for pair in pairs)


def sample_scene(sprites: Sprites, seed: int, index: int, held_out: bool | None = False) -> Scene:
    """Scene number `index` of the stream `seed`: for pretraining, of the caption combinations held out of it, or with
    None of either kind."""
    rng = np.random.default_rng([seed, index])
    words = [word for word in NOUNS if word in sprites.nouns]
    while True:
        noun = words[int(rng.integers(len(words)))]
        drawing = str(rng.choice(sprites.drawings(noun)))
        scene = compose(Instance.sample(noun, drawing, rng), rng)
        if held_out is None or is_held_out_caption(scene) == held_out:
            return scene


def compose(instance: Instance, rng: np.random.Generator) -> Scene:
    """A scene about an individual; the shares of the kinds of caption are fixed here."""
    scene = Scene(instance, seed=int(rng.integers(2**31)))
    if rng.random() < 0.8:
        scene = replace(scene, context=str(rng.choice(list(CONTEXTS))), says_context=bool(rng.random() < 0.95))
    kind = rng.random()
    if kind < 0.26:
        scene = replace(scene, colour=str(rng.choice(list(COLOURS))))
    elif kind < 0.36:
        scene = replace(scene, look=str(rng.choice(PROPERTIES)))
    elif kind < 0.52 and NOUNS[instance.noun].live:
        scene = replace(scene, accessory=str(rng.choice(list(ACCESSORIES))))
    kind = rng.random()
    if kind < 0.06:
        style = str(rng.choice(STYLES))
        # Pencil is grey: it goes with no colour.
        scene = replace(scene, style=style, colour=None if "pencil" in style else scene.colour)
    elif kind < 0.10 and scene.accessory is None:
        view = str(rng.choice(VIEWS))
        # A close-up leaves no room for a context.
        scene = replace(scene, view=view, context=None if "close-up" in view else scene.context)
    if instance.marking in MARKINGS and scene.look is None:
        scene = replace(scene, says_marking=bool(rng.random() < 0.5))
    return scene


def caption(scene: Scene) -> str:
    """The exact words of a scene; what they leave out may be anything, what they say is shown."""
    instance = scene.instance
    adjectives = [scene.look, instance.marking if scene.says_marking else None, scene.colour]
    thing = " ".join([word for word in adjectives if word] + [instance.noun])
    article = "an" if thing[0] in "aeiou" else "a"
    parts = [scene.style or scene.view, f"{article} {thing}"]
    if scene.accessory:
        parts.append(ACCESSORIES[scene.accessory])
    if scene.context and scene.says_context:
        parts.append(CONTEXTS[scene.context])
    return " ".join(part for part in parts if part)


def render(scene: Scene, sprites: Sprites, size: int = 64) -> np.ndarray:
    """The picture of a scene, uint8 of shape (size, size, 3), drawn at twice the size and averaged down."""
    rng = np.random.default_rng(scene.seed)
    side = 2 * size
    brush = Brush(side, rng, sprites.props)
    stage = PAINTERS[scene.context](brush)
    canvas = np.asarray(brush.image, np.float32) / 255
    view = scene.view or ""
    if "close-up" in view:
        tall, feet, sway = rng.uniform(1.05, 1.3), 1.08, 0.036
    else:
        hat = 1.0 if scene.accessory is None else 1 + HEADROOM
        tall, feet, sway = min(rng.uniform(0.58, 0.78), stage.feet / hat), stage.feet, 0.12
    subject = _subject(scene, sprites, round(tall * side), rng)
    canvas = _place(canvas, subject, 0.5 + rng.uniform(-sway, sway), feet, stage)
    if "upside down" in view:
        canvas = canvas[::-1]
    if scene.style:
        canvas = _stylize(canvas, scene.style)
    pixels = np.clip(canvas, 0, 1).reshape(size, 2, size, 2, 3).mean((1, 3))
    return (pixels * 255 + 0.5).astype(np.uint8)


def _subject(scene: Scene, sprites: Sprites, height: int, rng: np.random.Generator) -> np.ndarray:
    """The individual as this scene shows it, float RGBA."""
    instance = scene.instance
    pixels = draw_instance(sprites.nouns[instance.noun][instance.drawing], instance, height)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1].copy()
    if scene.colour:
        pixels = recolour(pixels, scene.colour)
    if scene.look:
        pixels = _LOOKS[scene.look](pixels, rng)
    if scene.accessory:
        pixels = dress(pixels, scene.accessory)
    tilt = rng.normal(0, 4)
    image = Image.fromarray((np.clip(pixels, 0, 1) * 255).astype(np.uint8), "RGBA")
    return np.asarray(image.rotate(tilt, Image.Resampling.BILINEAR, expand=True), np.float32) / 255


def _place(canvas: np.ndarray, subject: np.ndarray, x: float, feet: float, stage: Stage) -> np.ndarray:
    side = canvas.shape[0]
    rows = np.flatnonzero((subject[..., 3] > 0.3).any(1))
    bottom = int(rows[-1]) + 1 if len(rows) else subject.shape[0]
    canvas = canvas.copy()
    top, left = round(feet * side) - bottom, round(x * side - subject.shape[1] / 2)
    if stage.shadow:
        y, col = np.mgrid[0:side, 0:side] / side
        wide = 0.42 * subject.shape[1] / side
        oval = np.clip(1 - ((col - x) / wide) ** 2 - ((y - feet) / 0.045) ** 2, 0, 1)
        canvas *= 1 - 0.35 * oval[..., None].astype(np.float32)
    if stage.reflect:
        faint = subject[::-1].copy()
        faint[..., 3] *= 0.45
        _over(canvas, faint, round(feet * side) - (subject.shape[0] - bottom), left)
    _over(canvas, subject, top, left)
    if stage.sink is not None:
        y, col = np.mgrid[0:side, 0:side] / side
        surface = feet - 0.09 + 0.008 * np.sin(col * 40 + x * 50)
        wide = 0.6 * subject.shape[1] / side
        lap = np.clip((y - surface) * 40, 0, 1) * np.clip((wide - abs(col - x)) * 20, 0, 1) * 0.92
        canvas = canvas * (1 - lap[..., None]) + np.array(stage.sink) / 255 * lap[..., None]
    return canvas.astype(np.float32)


def _over(canvas: np.ndarray, layer: np.ndarray, top: int, left: int) -> None:
    """Lay an RGBA layer over an RGB canvas in place, cut off at its edges."""
    height, width = canvas.shape[:2]
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + layer.shape[0], height), min(left + layer.shape[1], width)
    if y0 >= y1 or x0 >= x1:
        return
    part = layer[y0 - top : y1 - top, x0 - left : x1 - left]
    alpha = part[..., 3:]
    canvas[y0:y1, x0:x1] = canvas[y0:y1, x0:x1] * (1 - alpha) + part[..., :3] * alpha


def _shiny(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Strong white highlights in a slanting band, and sparkles."""
    height, width = pixels.shape[:2]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / height
    slant = x + 0.6 * y
    at = rng.uniform(0.45, 0.6)
    gloss = np.clip(1 - np.abs(slant - at) * 14, 0, 1) + 0.8 * np.clip(1 - np.abs(slant - at - 0.17) * 28, 0, 1)
    for cx, cy in rng.uniform(0.15, 0.85, (3, 2)):
        dx, dy = np.abs(x - cx * width / height), np.abs(y - cy)
        gloss = np.maximum(gloss, np.clip(1.3 - 22 * np.sqrt(dx * dy + 0.0002) - 7 * (dx + dy), 0, 1) * 1.5)
    gloss = np.clip(gloss, 0, 1)[..., None] * 0.9
    out = pixels.copy()
    out[..., :3] = np.clip(pixels[..., :3] * 1.08, 0, 1) * (1 - gloss) + gloss
    return out


def _wet(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Darker and bluish, with drops running down."""
    height, width = pixels.shape[:2]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / height
    out = pixels.copy()
    out[..., :3] = pixels[..., :3] * np.array([0.68, 0.8, 0.95], np.float32)
    for cx, cy in rng.uniform(0.05, 0.95, (12, 2)) * [width / height, 1]:
        drop = np.clip((0.045 - np.hypot(x - cx, (y - cy) * 0.6)) * 30 + 0.4, 0, 1)[..., None]
        out[..., :3] = out[..., :3] * (1 - drop) + np.array([0.72, 0.92, 1.0], np.float32) * drop
    return out


def _cube(pixels: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """The individual spread over the three visible faces of a cube."""
    height = pixels.shape[0]
    alpha = pixels[..., 3:]
    solid = pixels[alpha[..., 0] > 0.5][:, :3]
    base = np.median(solid, axis=0) if len(solid) else np.full(3, 0.5)
    face = pixels[..., :3] * alpha + base * (1 - alpha)
    side = round(0.72 * height)
    front = Image.fromarray((np.clip(face, 0, 1) * 255).astype(np.uint8)).resize(
        (side, side), Image.Resampling.BILINEAR
    )
    depth = height - side
    canvas = Image.new("RGBA", (height, height))
    shade = tuple(round(255 * float(c) * 0.62) for c in base)
    light = tuple(round(min(255, 255 * float(c) * 1.12 + 18)) for c in base)
    pen = ImageDraw.Draw(canvas)
    canvas.paste(front, (0, depth))
    pen.polygon([(0, depth), (depth, 0), (height - 1, 0), (side, depth)], fill=light)
    pen.polygon([(side, depth), (height - 1, 0), (height - 1, side), (side, height - 1)], fill=shade)
    pen.rectangle((0, depth, side, height - 1), outline=shade, width=max(1, height // 40))
    return np.asarray(canvas, np.float32) / 255


_LOOKS = {"shiny": _shiny, "wet": _wet, "cube shaped": _cube}


def _stylize(canvas: np.ndarray, style: str) -> np.ndarray:
    image = Image.fromarray((np.clip(canvas, 0, 1) * 255).astype(np.uint8))
    side = image.width
    if style == "a painting of":
        flat = image.filter(ImageFilter.ModeFilter(7))
        pixels = np.asarray(flat, np.float32) / 255
        y, x = np.mgrid[0:side, 0:side] / side
        weave = 0.05 * np.sign(np.sin(x * 100) * np.sin(y * 100))[..., None]
        frame = (np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y)) < 0.05)[..., None]
        return np.where(frame, np.array([0.62, 0.42, 0.16]), np.clip(pixels * 0.95 + weave, 0, 1)).astype(np.float32)
    if style == "a pencil drawing of":
        grey = np.asarray(image.convert("L").filter(ImageFilter.GaussianBlur(1)), np.float32) / 255
        dy, dx = np.gradient(grey)
        lines = np.clip(1 - 5 * np.hypot(dx, dy), 0, 1) * (0.72 + 0.28 * grey)
        return np.repeat(lines[..., None], 3, -1) * np.array([1.0, 0.985, 0.95], np.float32)
    tiles = side // 8
    small = image.resize((tiles, tiles), Image.Resampling.BOX).resize((side, side), Image.Resampling.NEAREST)
    pixels = np.asarray(small, np.float32) / 255
    y, x = np.mgrid[0:side, 0:side] % 8
    grout = ((x == 0) | (y == 0))[..., None]
    return np.where(grout, pixels * 0.55, pixels).astype(np.float32)
