from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnAddedKVProcessor2_0, AttnProcessor2_0
from PIL import Image

from dreambooth.backbones import Backbone, open_backbone
from dreambooth.sampling.sampler import (
    SamplerSettings,
    largest_power,
    load_pipeline,
    sample,
    scheduler_class,
    to_pixels,
)

SETTINGS = SamplerSettings(resolution=32, steps=3, guidance=5.0, batch=3, threads=1, precision="fp32")
CPU = torch.device("cpu")
PROMPTS, SEEDS = ["a dog", "a cat on the beach", "a red mug"], [3, 2**32 - 1, 5]


@pytest.fixture(params=["small_stable_diffusion", "small_sdxl", "small_if"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    folder: Path = request.getfixturevalue(request.param)
    return open_backbone(folder)


def draw(pipeline: Any, prompts: list[str], seeds: list[int], batch: int) -> np.ndarray:
    images = sample(pipeline, prompts, seeds, replace(SETTINGS, batch=batch))
    assert all(image.mode == "RGB" and image.size == (32, 32) for image in images)
    return np.stack([np.asarray(image, int) for image in images])


@pytest.mark.parametrize("scheduler", [None, "DDPMScheduler", "EulerAncestralDiscreteScheduler"])
def test_an_image_does_not_depend_on_the_others_of_its_batch(backbone: Backbone, scheduler: str | None) -> None:
    pipeline = load_pipeline(backbone, replace(SETTINGS, scheduler=scheduler), CPU)
    together = draw(pipeline, PROMPTS, SEEDS, batch=3)
    for batch in (1, 2):
        np.testing.assert_allclose(draw(pipeline, PROMPTS, SEEDS, batch), together, atol=1)
    np.testing.assert_allclose(draw(pipeline, PROMPTS[::-1], SEEDS[::-1], batch=2)[::-1], together, atol=1)


def test_an_image_depends_on_its_own_prompt_and_seed(backbone: Backbone) -> None:
    pipeline = load_pipeline(backbone, replace(SETTINGS, scheduler="DDPMScheduler"), CPU)
    first = draw(pipeline, PROMPTS, SEEDS, batch=3)
    np.testing.assert_array_equal(draw(pipeline, PROMPTS, SEEDS, batch=3), first)
    for prompts, seeds in ((PROMPTS, [3, 8, 5]), (["a dog", "zebra", "a red mug"], SEEDS)):
        other = draw(pipeline, prompts, seeds, batch=3)
        changed = np.abs(other - first).max((1, 2, 3))
        assert changed[1] > 1
        assert changed[[0, 2]].max() <= 1


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_an_image_is_that_of_a_plain_call_to_diffusers(backbone: Backbone, guidance: float) -> None:
    settings = replace(SETTINGS, guidance=guidance)
    [ours] = sample(load_pipeline(backbone, settings, CPU), ["a dog"], [3], settings)
    pipeline = getattr(diffusers, backbone.pipeline_classes[0]).from_pretrained(backbone.folder)
    generator = torch.Generator().manual_seed(3)
    plain = pipeline("a dog", num_inference_steps=3, guidance_scale=guidance, generator=generator)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(plain.images[0]))


def test_settings_reach_the_pipeline(backbone: Backbone) -> None:
    unet = backbone.load("unet")
    settings = replace(SETTINGS, scheduler="HeunDiscreteScheduler", precision="bf16")
    pipeline = load_pipeline(backbone, settings, CPU, {"unet": unet})
    assert type(pipeline.scheduler) is diffusers.HeunDiscreteScheduler
    assert pipeline.scheduler.config.prediction_type == backbone.objective.prediction
    assert pipeline.unet is unet
    assert pipeline.text_encoder.dtype == torch.bfloat16
    assert torch.get_num_threads() == 1
    assert getattr(pipeline, "watermark", None) is None
    assert getattr(pipeline, "safety_checker", None) is None


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("DDPMSheduler", "DDPMScheduler"),
        ("EulerDiscrete", "EulerDiscreteScheduler"),
        ("UNet2DConditionModel", "Scheduler"),
        ("", "Scheduler"),
    ],
)
def test_an_unknown_scheduler_is_named_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"^'{name}' is no diffusers scheduler; the nearest name is '.*{nearest}'$"):
        scheduler_class(name)


@pytest.mark.parametrize("name", [name for name in dir(diffusers) if name.endswith("Scheduler")])
def test_every_scheduler_can_be_had_or_another_is_proposed(name: str) -> None:
    if issubclass(getattr(diffusers, name), diffusers.SchedulerMixin):
        assert scheduler_class(name) is getattr(diffusers, name)
        return
    with pytest.raises(ValueError, match="is no diffusers scheduler") as error:  # its own dependency is absent
        scheduler_class(name)
    proposed = str(error.value).split("'")[-2]
    assert scheduler_class(proposed).__name__ == proposed != name


def test_pixels_are_in_the_networks_range() -> None:
    black, grey = Image.new("RGB", (6, 4)), Image.new("L", (6, 4), 51)
    left_white = Image.fromarray(np.repeat(np.array([[255, 0, 0, 0, 0, 0]] * 4, np.uint8)[..., None], 3, -1))
    pixels = to_pixels([black, left_white, grey])
    assert (pixels.dtype, pixels.shape) == (torch.float32, (3, 3, 4, 6))
    assert (pixels[0] == -1).all()
    assert (pixels[1, :, :, 0] == 1).all()
    assert (pixels[1, :, :, 1:] == -1).all()
    torch.testing.assert_close(pixels[2], torch.full((3, 4, 6), 51 / 127.5 - 1))


def test_settings_are_recorded_whole() -> None:
    assert SamplerSettings(**SETTINGS.as_dict()) == SETTINGS
    assert SETTINGS.as_dict().keys() == SamplerSettings.__dataclass_fields__.keys()


ANCESTRAL = replace(SETTINGS, steps=4, batch=1, scheduler="EulerAncestralDiscreteScheduler")
LARGEST_STEP = 1
"""Between batch shapes kernels round differently: a channel of a pixel may fall to the next of its 256 levels."""


def drawn(pipeline: Any, prompts: list[str], seeds: list[int], **settings: Any) -> np.ndarray:
    return np.stack([np.asarray(i) for i in sample(pipeline, prompts, seeds, replace(ANCESTRAL, **settings))])


def test_batches_of_1_3_and_8_agree_but_for_rounding(backbone: Backbone) -> None:
    pipeline = load_pipeline(backbone, ANCESTRAL, CPU)
    prompts, seeds = ["a dog"] * 20 + ["a mug"] * 4, list(range(100, 124))
    alone = drawn(pipeline, prompts, seeds).astype(int)
    assert len(np.unique(alone.reshape(24, -1), axis=0)) == 24
    for batch in (3, 8):
        together = drawn(pipeline, prompts, seeds, batch=batch)
        assert np.abs(together - alone).max() <= LARGEST_STEP


def test_pixels_that_are_not_finite_are_named_by_prompt_and_seed(backbone: Backbone) -> None:
    pipeline = load_pipeline(backbone, ANCESTRAL, CPU)
    with torch.no_grad():
        pipeline.unet.conv_out.bias[0] = float("nan")
    with pytest.raises(ArithmeticError, match=r"'a dog' with seed 3, 'a dog' with seed 4"):
        drawn(pipeline, ["a dog", "a dog"], [3, 4], batch=2)


def test_nothing_marks_or_blanks_images_and_attention_is_fused(backbone: Backbone) -> None:
    pipeline = load_pipeline(backbone, ANCESTRAL, CPU)
    assert getattr(pipeline, "watermark", None) is None
    assert getattr(pipeline, "safety_checker", None) is None
    fused = {AttnProcessor2_0, AttnAddedKVProcessor2_0}
    assert {type(processor) for processor in pipeline.unet.attn_processors.values()} <= fused
    assert type(pipeline.scheduler).__name__ == ANCESTRAL.scheduler


@pytest.mark.parametrize(("room", "batch"), [(1, 1), (7, 4), (8, 8), (1000, 64)])
def test_the_largest_batch_is_found_by_doubling(room: int, batch: int) -> None:
    assert largest_power(lambda size: size <= room) == batch


def test_a_device_without_room_for_one_image_is_told() -> None:
    with pytest.raises(ValueError, match="--resolution"):
        largest_power(lambda size: size == 0)


@pytest.mark.slow
def test_a_compiled_denoiser_draws_the_same_but_for_rounding(small_stable_diffusion: Path) -> None:
    backbone = open_backbone(small_stable_diffusion)
    plain = drawn(load_pipeline(backbone, ANCESTRAL, CPU), ["a dog"] * 2, [1, 2], batch=2)
    compiled = load_pipeline(backbone, replace(ANCESTRAL, compile=True), CPU)
    assert compiled.unet._compiled_call_impl is not None
    together = drawn(compiled, ["a dog"] * 2, [1, 2], batch=2)
    assert np.abs(together.astype(int) - plain).max() <= LARGEST_STEP
