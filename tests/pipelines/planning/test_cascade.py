"""Stage III: planned when it ends a cascade, and drawn as diffusers' own upscaling pipeline draws."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionUpscalePipeline
from PIL import Image

from dreambooth.backbones import Upscaler
from dreambooth.versions.pipeline import upscaling_stage
from pipelines.planning.options import parse
from pipelines.planning.plan import Plan, make_plan
from pipelines.planning.report import describe
from tests.pipelines.test_cascade import cascade


@pytest.fixture(scope="module")
def plan(
    photos: Path,
    small_if: Path,
    small_if_super_resolution: Path,
    small_upscaler: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Plan:
    """A cascade with an upscaler at its end."""
    arguments = cascade(photos, small_if, small_if_super_resolution, tmp_path_factory.mktemp("upscaling"))
    return make_plan(parse([*arguments, "--upscaler", str(small_upscaler), "--sample-steps", "3"], ""))


def test_the_upscaler_belongs_to_the_run_and_to_nothing_that_is_trained(
    plan: Plan, photos: Path, small_if: Path, small_if_super_resolution: Path, tmp_path: Path
) -> None:
    run = plan.subjects[0].run
    assert isinstance(plan.upscaler, Upscaler)
    assert plan.upscaler.factor == 4
    assert run.upscaling is not None
    assert run.upscaling.backbone == plan.upscaler.hash
    assert (run.upscaling.samples.resolution, run.upscaling.samples.steps) == (256, 3)
    assert run.upscaling.samples.guidance == 9.0
    assert [stage.training.resolution for stage in run.cascade] == [32, 64]
    assert plan.stored == (*plan.backbones, plan.upscaler)
    assert any(plan.upscaler.hash[:12] in line for line in describe(plan))
    other = make_plan(parse(cascade(photos, small_if, small_if_super_resolution, tmp_path), ""))
    assert other.subjects[0].run.upscaling is None
    assert other.subjects[0].run.version != run.version


def test_it_draws_what_diffusers_draws_of_the_class(plan: Plan, small_upscaler: Path) -> None:
    run = plan.subjects[0].run
    assert plan.upscaler is not None
    assert run.upscaling is not None
    plan.store.add_backbone(plan.upscaler)
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    [image] = upscaling_stage(plan.store, run, run.upscaling).draw([f"a {run.phrase} in the snow"], [5], [small])
    pipeline = StableDiffusionUpscalePipeline.from_pretrained(small_upscaler)
    drawn = pipeline(
        prompt="a mug in the snow",
        image=small,
        num_inference_steps=3,
        guidance_scale=9.0,
        noise_level=100,
        generator=torch.Generator().manual_seed(5),
    ).images
    assert image.size == (256, 256)
    assert np.array_equal(np.asarray(image), np.asarray(drawn[0]))


MISTAKES = {
    "nothing to end": (["--backbone", "{if_i}", "--upscaler", "{x4}"], "give both, or leave it out"),
    "no upscaler": (
        ["--backbone", "{if_i}", "--super-resolution", "{if_ii}", "--upscaler", "{if_ii}"],
        "(deepfloyd-if-ii) is no upscaler",
    ),
    "the upscaler alone": (["--backbone", "{x4}"], "and this one as --upscaler"),
    "the upscaler in the place of stage II": (
        ["--backbone", "{if_i}", "--super-resolution", "{x4}"],
        "give stage II of DeepFloyd IF",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_upscaler_that_does_not_fit_is_named(
    mistake: str, photos: Path, small_if: Path, small_if_super_resolution: Path, small_upscaler: Path, tmp_path: Path
) -> None:
    arguments, says = MISTAKES[mistake]
    folders = {"if_i": small_if, "if_ii": small_if_super_resolution, "x4": small_upscaler}
    named = [argument.format(**folders) for argument in arguments]
    with pytest.raises(ValueError, match=re.escape(says)):
        make_plan(parse(["--images", str(photos), "--class-noun", "mug", "--store", str(tmp_path), *named], ""))
