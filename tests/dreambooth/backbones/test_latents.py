"""Latents of an autoencoder and of pixels: scaled to the denoiser and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dreambooth.backbones import open_backbone


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shift_factor": 0.5},
        {"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [1.5, 2.0, 0.5, 1.0]},
    ],
)
def test_unscaled_latents_are_those_that_were_scaled(small_sdxl: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    copy = Path(shutil.copytree(small_sdxl, tmp_path / "copy"))
    file = copy / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    latents = open_backbone(copy).latents
    drawn = torch.randn(2, 4, 8, 8)
    scaled = latents.scale(drawn)
    assert not torch.allclose(scaled, drawn)
    torch.testing.assert_close(latents.unscale(scaled), drawn)


def test_pixels_are_their_own_latents(small_if: Path) -> None:
    latents = open_backbone(small_if).latents
    pixels = torch.rand(1, 3, 8, 8)
    assert torch.equal(latents.unscale(latents.scale(pixels)), pixels)
