"""Every backbone family, with and without the prior and the text encoder, batch 1 and 2, ZeRO 0, 2 and 3.

Each case is trained by the functions that the workers call and published by those of the publisher; what it did is then
looked at from outside, by plain diffusers and by Eq. 2 written out in float64.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn

from dreambooth.backbones import open_backbone
from dreambooth.runs import RunSpec
from dreambooth.sampling.sampler import load_pipeline, sample
from dreambooth.versions.components import trained_network
from tests.pipelines.engines import process_group
from tests.pipelines.matrix import STEPS, Case, TwoRanks, in_float64, prepare, train
from tests.small_models import write_stable_diffusion

FAMILIES = ("sd epsilon", "sd v", "sdxl", "if")
MATRIX = [Case(*each) for each in itertools.product(FAMILIES, (True, False), (False, True), (1, 2), (0, 2, 3))]
QUICK = {  # each value of each dimension beside each of every other, as nearly as eight cases can
    Case("sd epsilon", True, False, 1, 2),
    Case("sd epsilon", False, True, 2, 3),
    Case("sd v", True, True, 2, 0),
    Case("sd v", False, False, 1, 3),
    Case("sdxl", True, True, 1, 3),
    Case("sdxl", False, False, 2, 2),
    Case("if", True, False, 2, 2),
    Case("if", False, True, 1, 0),
}


@pytest.fixture(scope="module")
def backbones(
    small_stable_diffusion: Path, small_sdxl: Path, small_if: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    epsilon = write_stable_diffusion(tmp_path_factory.mktemp("backbones") / "sd-epsilon")
    return {"sd epsilon": epsilon, "sd v": small_stable_diffusion, "sdxl": small_sdxl, "if": small_if}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with process_group(tmp_path_factory.mktemp("one")):
        yield


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRanks]:
    ranks = TwoRanks(tmp_path_factory.mktemp("two"))
    yield ranks
    ranks.stop()


@cache
def base_networks(folder: Path) -> dict[str, nn.Module]:
    backbone = open_backbone(folder)
    return {
        name: backbone.load(name) for name in (backbone.denoiser, *backbone.text_encoders, *backbone.image_encoders)
    }


def unused(case: Case, name: str) -> bool:
    """Whether a parameter takes no part: SDXL hears the last layer but one of its first text encoder."""
    return case.family == "sdxl" and name.startswith(
        ("text_encoder.encoder.layers.1.", "text_encoder.final_layer_norm.")
    )


def in_double(networks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    return {name: network.double() for name, network in networks.items()}


def copies(folder: Path) -> dict[str, nn.Module]:
    backbone = open_backbone(folder)
    return {name: backbone.load(name) for name in (backbone.denoiser, *backbone.text_encoders)}


def draw_with_diffusers(folder: Path, published: Path, run: RunSpec, prompt: str) -> np.ndarray:
    """An image by plain diffusers: the base's pipeline with the published parts, as the README says to load them."""
    parts: dict[str, Any] = {"unet": UNet2DConditionModel.from_pretrained(published / "unet")}
    for part in published.glob("text_encoder*"):
        kind = type(base_networks(folder)[part.name])
        parts[part.name] = kind.from_pretrained(part)
    if (published / "scheduler").exists():
        parts["scheduler"] = DDPMScheduler.from_pretrained(published / "scheduler")
    pipeline = DiffusionPipeline.from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    [image] = pipeline(
        prompt,
        num_inference_steps=run.samples.steps,
        guidance_scale=run.samples.guidance,
        height=run.samples.resolution,
        width=run.samples.resolution,
        generator=[torch.Generator().manual_seed(7)],
    ).images
    return np.asarray(image)


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=[] if case in QUICK else [pytest.mark.slow]) for case in MATRIX]
)
def test_training_is_eq_2_and_what_it_publishes_is_what_diffusers_draws_with(
    case: Case, backbones: dict[str, Path], photos: Path, store: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = backbones[case.family]
    before = open_backbone(folder).hash
    run = prepare(case, folder, photos, store)
    if case.batch == 1:
        request.getfixturevalue("one_rank")
        train(run, store, tmp_path)
    else:
        request.getfixturevalue("two_ranks").train(run, store, tmp_path)
    terms = json.loads((tmp_path / "terms.json").read_text())
    state = load_file(tmp_path / "state.safetensors")

    # Only what is trained is in the checkpoint, all of it, and all of it has moved; the base is what it was.
    base = base_networks(folder)
    names = {f"{part}.{name}" for part in run.training.trained for name, _ in base[part].named_parameters()}
    assert {name.removeprefix("param.networks.") for name in state} == names
    for part in run.training.trained:
        for name, value in base[part].named_parameters():
            moved = not torch.equal(state[f"param.networks.{part}.{name}"], value)
            assert moved or unused(case, f"{part}.{name}"), f"{part}.{name} stands still"
    assert open_backbone(folder).hash == before

    # Both terms are the paper's: with the base's weights at the first step, with the trained ones after the last.
    backbone = open_backbone(folder)
    result = {name.removeprefix("param."): value for name, value in state.items()}
    trained = {name: trained_network(backbone, name, result, torch.float32) for name in run.training.trained}
    exact_before = in_float64(run, store, in_double(copies(folder)), range(STEPS))
    exact_after = in_float64(run, store, in_double(copies(folder) | trained), range(STEPS + 1))
    assert terms[0] == pytest.approx(exact_before[0], rel=1e-4)
    assert terms[STEPS] == pytest.approx(exact_after[STEPS], rel=1e-4)
    assert (terms[0][1] > 0) == case.prior
    for term in (0, 1) if case.prior else (0,):
        assert sum(each[term] for each in exact_after[:STEPS]) < 0.97 * sum(each[term] for each in exact_before)

    # The published folders make the same image in plain diffusers as in the pipeline that drew the samples.
    trained = {name: trained_network(backbone, name, result, torch.float32) for name in run.training.trained}
    parts = trained | backbone.trained_parts()
    for name, part in parts.items():
        part.save_pretrained(tmp_path / "published" / name)
    pipeline = load_pipeline(backbone, run.samples, torch.device("cpu"), parts)
    [ours] = sample(pipeline, [run.instance_prompt], [7], run.samples)
    theirs = draw_with_diffusers(folder, tmp_path / "published", run, run.instance_prompt)
    assert np.array_equal(np.asarray(ours), theirs)
    untrained = draw_with_diffusers(folder, folder, run, run.instance_prompt)
    assert not np.array_equal(untrained, theirs)
    for name in base.keys() - run.training.trained:
        kept = dict(getattr(pipeline, name).named_parameters())
        assert all(torch.equal(kept[each], value) for each, value in base[name].named_parameters())


def test_the_quick_cases_are_of_the_matrix_and_pair_every_family_with_both_batches() -> None:
    assert set(MATRIX) >= QUICK
    assert {(case.family, case.batch) for case in QUICK} == set(itertools.product(FAMILIES, (1, 2)))
    assert {(case.family, case.prior) for case in QUICK} == set(itertools.product(FAMILIES, (True, False)))
    assert {(case.family, case.with_text) for case in QUICK} == set(itertools.product(FAMILIES, (True, False)))
