"""Instances of a class: one drawing, recoloured, reshaped and marked, so that a class is a wide distribution.

All functions work on float RGBA pictures of shape (H, W, 4) in [0, 1].
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from dreambooth.embedded.vocabulary import COLOURS


@dataclass(frozen=True)
class Instance:
    """What makes one individual: everything about it that stays the same from scene to scene."""

    noun: str
    drawing: str
    hue: float = 0.0
    saturation: float = 1.0
    value: float = 1.0
    aspect: float = 1.0
    marking: str | None = None
    marking_seed: int = 0

    @staticmethod
    def sample(noun: str, drawing: str, rng: np.random.Generator) -> "Instance":
        """An individual drawn at random: natural shifts of hue, brightness and proportion, sometimes markings."""
        marking = str(rng.choice(["none", "spotted", "striped", "two-tone"], p=[0.64, 0.13, 0.13, 0.10]))
        return Instance(
            noun,
            drawing,
            hue=float(rng.normal(0, 0.025)),
            saturation=float(rng.uniform(0.7, 1.15)),
            value=float(rng.uniform(0.82, 1.1)),
            aspect=float(np.exp(rng.normal(0, 0.09))),
            marking=None if marking == "none" else marking,
            marking_seed=int(rng.integers(2**31)),
        )


def draw_instance(sprite: Image.Image, instance: Instance, height: int) -> np.ndarray:
    """The individual at `height` pixels, as float RGBA of shape (height, width, 4)."""
    width = max(8, round(height * instance.aspect))
    picture = sprite.resize((width, height), Image.Resampling.BOX if height < 128 else Image.Resampling.LANCZOS)
    pixels = np.asarray(picture, np.float32) / 255
    h, s, v = rgb_to_hsv(pixels[..., :3])
    rgb = hsv_to_rgb(h + instance.hue, np.clip(s * instance.saturation, 0, 1), np.clip(v * instance.value, 0, 1))
    if instance.marking:
        rgb = _mark(rgb, instance.marking, np.random.default_rng(instance.marking_seed))
    return np.concatenate([rgb, pixels[..., 3:]], axis=-1)


def recolour(pixels: np.ndarray, colour: str) -> np.ndarray:
    """Turn the whole individual into one of `COLOURS`, keeping its shading, its darkest lines and its alpha."""
    hue, saturation, value = COLOURS[colour]
    rgb = pixels[..., :3]
    light = rgb @ np.array([0.35, 0.5, 0.15], np.float32)
    opaque = pixels[..., 3] > 0.5
    low, high = np.quantile(light[opaque], [0.04, 0.96]) if opaque.any() else (0.0, 1.0)
    light = np.clip(1 + (light - high) / max(high - low, 0.5), 0, 1)
    shade = np.clip(0.22 + 1.05 * light, 0, 1)
    out = hsv_to_rgb(np.full_like(shade, hue), saturation * (1.0 - 0.25 * light**3), value * shade)
    return np.concatenate([out, pixels[..., 3:]], axis=-1)


def _mark(rgb: np.ndarray, marking: str, rng: np.random.Generator) -> np.ndarray:
    """Spots, stripes or a darker lower half, in one darker or lighter colour, at places fixed by the individual."""
    height, width = rgb.shape[:2]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / height
    mask = np.zeros((height, width), np.float32)
    if marking == "spotted":
        size = rng.uniform(0.05, 0.09)
        for cx, cy in rng.uniform(0, 1, (16, 2)) * [width / height, 1]:
            mask = np.maximum(mask, np.clip((size - np.hypot(x - cx, y - cy)) * 20 + 0.5, 0, 1))
    elif marking == "striped":
        angle, count = rng.uniform(-0.5, 0.5), rng.uniform(4, 7)
        wave = np.sin(2 * np.pi * count * (x * np.cos(angle) + y * np.sin(angle)) + rng.uniform(0, 6))
        mask = np.clip(wave * 3 - 0.8, 0, 1)
    else:
        mask = np.clip((y - rng.uniform(0.45, 0.65)) * 12, 0, 1)
    light = rgb.mean()
    tone = np.array(rng.uniform(0.1, 0.35, 3) if light > 0.45 else rng.uniform(0.75, 0.95, 3), np.float32)
    mask = (0.75 * mask)[..., None]
    return rgb * (1 - mask) + tone * mask


def rgb_to_hsv(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue in turns, saturation and value of (..., 3) pictures in [0, 1]."""
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    # Several times faster than numpy's maximum along an axis of three.
    high, low = np.maximum(np.maximum(r, g), b), np.minimum(np.minimum(r, g), b)
    span = np.maximum(high - low, 1e-6)
    hue = np.where(high == r, (g - b) / span, np.where(high == g, 2 + (b - r) / span, 4 + (r - g) / span)) / 6
    return hue % 1.0, (high - low) / np.maximum(high, 1e-6), high


def hsv_to_rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The (..., 3) picture of hue in turns, saturation and value."""
    offsets = np.array([5, 3, 1], np.float32)
    k = (offsets + (hue % 1.0)[..., None] * 6) % 6
    return (value[..., None] * (1 - saturation[..., None] * np.clip(np.minimum(k, 4 - k), 0, 1))).astype(np.float32)
