"""LPIPS, how different two pictures look: the distance behind the paper's diversity score.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018: equation 1, with the
features of AlexNet (Krizhevsky 2014, as torchvision trained it). The weights are the authors' and torchvision's, put
into a file of safetensors where the `lpips` package and torchvision are installed:

    python -m dreambooth.metrics.lpips lpips-alex.safetensors
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

_BATCH = 32
_CONVOLUTIONS = ((4, 2), (1, 2), (1, 1), (1, 1), (1, 1))
"""Stride and padding of AlexNet's; 3x3 maxima over steps of 2 come before the second and the third."""
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""What the authors normalize pixels in [-1, 1] by."""


class Lpips:
    """LPIPS version 0.1 on AlexNet."""

    name = "lpips-alex"

    def __init__(self, weights: str | Path, device: str | torch.device = "cpu") -> None:
        """Read a file that this module wrote; raises ValueError when it is none."""
        try:
            tensors = load_file(weights)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"LPIPS weights {str(weights)!r} cannot be read: {error}") from error
        if missing := sorted(_names() - tensors.keys()):
            raise ValueError(f"LPIPS weights {str(weights)!r} lack {missing[0]}")
        self._weights = {name: tensor.float().to(device) for name, tensor in tensors.items()}
        self._device = device

    @torch.no_grad()
    def distances(self, images: Sequence[Image.Image]) -> Tensor:
        """Distances between all pictures of one size, float32 (N, N), symmetric, zeros on the diagonal."""
        pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
        pixels = pixels.permute(0, 3, 1, 2).float().to(self._device) / 127.5 - 1
        first, second = torch.triu_indices(len(images), len(images), offset=1)
        parts = [
            self.between(pixels[one], pixels[other])
            for one, other in zip(first.split(_BATCH), second.split(_BATCH), strict=True)
        ]
        found = torch.zeros(len(images), len(images))
        if parts:
            found[first, second] = found[second, first] = torch.cat(parts).cpu()
        return found

    def between(self, x: Tensor, x_0: Tensor) -> Tensor:
        """Equation 1: the distances (B,) of pictures (B, 3, H, W) in [-1, 1]."""
        total = torch.zeros(len(x), device=x.device)
        for layer, (y, y_0) in enumerate(zip(self._features(x), self._features(x_0), strict=True)):
            difference = (_unit(y) - _unit(y_0)) ** 2
            total += F.conv2d(difference, self._weights[f"w.{layer}"]).mean(dim=(1, 2, 3))
        return total

    def _features(self, x: Tensor) -> list[Tensor]:
        shift, scale = (torch.tensor(value, device=x.device).view(3, 1, 1) for value in (_SHIFT, _SCALE))
        x = (x - shift) / scale
        found = []
        for layer, (stride, padding) in enumerate(_CONVOLUTIONS):
            if layer in (1, 2):
                x = F.max_pool2d(x, 3, 2)
            weight, bias = (self._weights[f"convolution.{layer}.{part}"] for part in ("weight", "bias"))
            x = F.conv2d(x, weight, bias, stride, padding).relu()
            found.append(x)
        return found


def _unit(features: Tensor) -> Tensor:
    """Features (B, C, H, W) of length 1 at each place."""
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)


def _names() -> set[str]:
    layers = range(len(_CONVOLUTIONS))
    return {f"convolution.{layer}.{part}" for layer in layers for part in ("weight", "bias")} | {
        f"w.{layer}" for layer in layers
    }


def from_authors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights by our names, from the state of the authors' `lpips.LPIPS(net="alex")`."""
    places = (("slice1", 0), ("slice2", 3), ("slice3", 6), ("slice4", 8), ("slice5", 10))
    found = {f"w.{layer}": state[f"lin{layer}.model.1.weight"] for layer in range(len(places))}
    for layer, (part, number) in enumerate(places):
        for kind in ("weight", "bias"):
            found[f"convolution.{layer}.{kind}"] = state[f"net.{part}.{number}.{kind}"]
    return {name: tensor.contiguous() for name, tensor in found.items()}


def main() -> None:
    """Write the file of weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    try:
        import lpips  # type: ignore[import-not-found]
    except ImportError as error:
        parser.error(f"`pip install lpips torchvision` first: {error}")
    save_file(from_authors(lpips.LPIPS(net="alex").state_dict()), out)


if __name__ == "__main__":
    main()
