"""The teacher: the denoiser as it was, whatever becomes of the one that is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dreambooth.backbones import open_backbone
from dreambooth.methods.teacher import Teacher


@pytest.mark.parametrize("name", ["small_sdxl", "small_stable_diffusion", "small_if"])
def test_it_predicts_what_the_backbone_predicts_and_learns_nothing(name: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(name)
    backbone = open_backbone(folder)
    teacher = Teacher(backbone, backbone.load(backbone.denoiser))
    denoiser = backbone.load(backbone.denoiser)
    encoders = {encoder: backbone.load(encoder) for encoder in backbone.text_encoders}
    conditioning = backbone.text.encode(encoders, backbone.text.tokenize(["a mug", "a dog"]))
    for key, value in backbone.size_conditioning((32, 32), (0, 0), (32, 32)).items():
        conditioning[key] = value.expand(2, *value.shape)
    z_t, t = torch.randn(2, *backbone.latents.shape(32)), torch.tensor([3, 700])
    said = teacher(z_t, t, conditioning)
    # Of DeepFloyd IF's six channels, the three that are trained.
    assert said.shape == z_t.shape
    assert not said.requires_grad
    assert torch.equal(said, backbone.predict(denoiser, z_t, t, conditioning))
    rounded = Teacher(backbone, backbone.load(backbone.denoiser, torch.bfloat16))(z_t, t, conditioning)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), said, rtol=0.1, atol=0.1)
