from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth.backbones import Backbone, open_backbone
from dreambooth.sampling import SamplerSettings, load_pipeline, sample, scheduler_class, to_pixels

SETTINGS = SamplerSettings(resolution=32, steps=3, guidance=5.0, batch=3, threads=1, precision="fp32")
CPU = torch.device("cpu")
PROMPTS, SEEDS = ["a dog", "a cat on the beach", "a red mug"], [3, 2**32 - 1, 5]


@pytest.fixture(params=["small_stable_diffusion", "small_sdxl"])
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


def test_an_image_is_that_of_a_plain_call_to_diffusers(backbone: Backbone) -> None:
    [ours] = sample(load_pipeline(backbone, SETTINGS, CPU), ["a dog"], [3], SETTINGS)
    pipeline = getattr(diffusers, backbone.pipeline_classes[0]).from_pretrained(backbone.folder)
    generator = torch.Generator().manual_seed(3)
    plain = pipeline("a dog", num_inference_steps=3, guidance_scale=5.0, height=32, width=32, generator=generator)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(plain.images[0]))


def test_settings_reach_the_pipeline(backbone: Backbone) -> None:
    unet = backbone.load("unet")
    settings = replace(SETTINGS, scheduler="HeunDiscreteScheduler", precision="bf16")
    pipeline = load_pipeline(backbone, settings, CPU, {"unet": unet})
    assert type(pipeline.scheduler) is diffusers.HeunDiscreteScheduler
    assert pipeline.scheduler.config.prediction_type == backbone.schedule.prediction
    assert pipeline.unet is unet
    assert pipeline.vae.dtype == torch.bfloat16
    assert torch.get_num_threads() == 1
    assert getattr(pipeline, "watermark", None) is None
    assert getattr(pipeline, "safety_checker", None) is None


def test_pixels_that_are_not_finite_are_an_error(backbone: Backbone) -> None:
    unet: Any = backbone.load("unet")
    with torch.no_grad():
        unet.conv_out.bias.fill_(torch.nan)
    pipeline = load_pipeline(backbone, SETTINGS, CPU, {"unet": unet})
    with pytest.raises(ArithmeticError, match=r"sampling \['a dog'\] gave pixels that are not finite"):
        sample(pipeline, ["a dog"], [0], SETTINGS)


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
