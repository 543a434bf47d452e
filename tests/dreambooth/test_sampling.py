"""Sampling: images are those of diffusers' own call, whatever stands beside them in a batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from dreambooth.backbones import Backbone, open_backbone
from dreambooth.sampling import SamplerSettings, largest_power, load_pipeline, sample

CPU = torch.device("cpu")
SETTINGS = SamplerSettings(
    resolution=32,
    steps=4,
    guidance=5.0,
    batch=1,
    threads=1,
    precision="fp32",
    scheduler="EulerAncestralDiscreteScheduler",
)
LARGEST_STEP = 1
"""Between batch shapes kernels round differently: a channel of a pixel may fall to the next of its 256 levels."""


@pytest.fixture(scope="module", params=["sdxl", "stable_diffusion"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return open_backbone(request.getfixturevalue(f"small_{request.param}"))


def drawn(pipeline: Any, prompts: list[str], seeds: list[int], **settings: Any) -> np.ndarray:
    return np.stack([np.asarray(i) for i in sample(pipeline, prompts, seeds, replace(SETTINGS, **settings))])


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_images_are_those_of_a_plain_diffusers_call(backbone: Backbone, guidance: float) -> None:
    pipeline = load_pipeline(backbone, SETTINGS, CPU)
    plain = [
        pipeline(prompt, num_inference_steps=4, guidance_scale=guidance, generator=torch.Generator().manual_seed(seed))
        for prompt, seed in [("a dog", 7), ("a mug", 8)]
    ]
    images = sample(pipeline, ["a dog", "a mug"], [7, 8], replace(SETTINGS, guidance=guidance))
    assert [image.tobytes() for image in images] == [output.images[0].tobytes() for output in plain]


def test_batches_of_1_3_and_8_agree_but_for_rounding(backbone: Backbone) -> None:
    pipeline = load_pipeline(backbone, SETTINGS, CPU)
    prompts, seeds = ["a dog"] * 20 + ["a mug"] * 4, list(range(100, 124))
    alone = drawn(pipeline, prompts, seeds).astype(int)
    assert len(np.unique(alone.reshape(24, -1), axis=0)) == 24
    for batch in (3, 8):
        together = drawn(pipeline, prompts, seeds, batch=batch)
        assert np.abs(together - alone).max() <= LARGEST_STEP


def test_pixels_that_are_not_finite_are_named_by_prompt_and_seed(backbone: Backbone) -> None:
    pipeline = load_pipeline(backbone, SETTINGS, CPU)
    with torch.no_grad():
        next(pipeline.vae.decoder.parameters())[0] = float("inf")
    with pytest.raises(ArithmeticError, match=r"'a dog' with seed 3, 'a dog' with seed 4"):
        drawn(pipeline, ["a dog", "a dog"], [3, 4], batch=2)


def test_nothing_marks_or_blanks_images_and_attention_is_fused(backbone: Backbone) -> None:
    pipeline = load_pipeline(backbone, SETTINGS, CPU)
    assert getattr(pipeline, "watermark", None) is None
    assert getattr(pipeline, "safety_checker", None) is None
    assert {type(processor) for processor in pipeline.unet.attn_processors.values()} == {AttnProcessor2_0}
    assert type(pipeline.scheduler).__name__ == SETTINGS.scheduler


@pytest.mark.parametrize(("room", "batch"), [(1, 1), (7, 4), (8, 8), (1000, 64)])
def test_the_largest_batch_is_found_by_doubling(room: int, batch: int) -> None:
    assert largest_power(lambda size: size <= room) == batch


def test_a_device_without_room_for_one_image_is_told() -> None:
    with pytest.raises(ValueError, match="--resolution"):
        largest_power(lambda size: size == 0)


@pytest.mark.slow
def test_a_compiled_denoiser_draws_the_same_but_for_rounding(small_stable_diffusion: Path) -> None:
    backbone = open_backbone(small_stable_diffusion)
    plain = drawn(load_pipeline(backbone, SETTINGS, CPU), ["a dog"] * 2, [1, 2], batch=2)
    compiled = load_pipeline(backbone, replace(SETTINGS, compile=True), CPU)
    assert compiled.unet._compiled_call_impl is not None
    together = drawn(compiled, ["a dog"] * 2, [1, 2], batch=2)
    assert np.abs(together.astype(int) - plain).max() <= LARGEST_STEP
