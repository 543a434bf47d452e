"""A compiled denoiser: the same training but for rounding, exact when resumed, and compiled once a lane."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dreambooth.runs import RunSpec
from dreambooth.store import SubjectStore
from pipelines.planning.options import parse
from pipelines.planning.plan import make_plan
from pipelines.stages.encode import TrainingSetEncoder
from pipelines.training.checkpoints import Checkpoint, checkpoint_folder, final_checkpoint
from pipelines.training.trainer import Worker
from pipelines.training.training_set import location_of
from tests.pipelines.engines import process_group
from tests.prior_sets import undisturbed

STEPS, EVERY = 4, 2


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with process_group(tmp_path_factory.mktemp("world")):
        yield


@pytest.fixture(scope="module")
def prepared(photos: Path, small_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SubjectStore, RunSpec]:
    """A run of one worker on a small SDXL, whose training set is in the store."""
    arguments = ["--images", str(photos), "--class-noun", "mug", "--backbone", str(small_sdxl), "--steps", str(STEPS)]
    arguments += ["--store", str(tmp_path_factory.mktemp("compile")), "--prior-images", "4", "--prior-batch", "4"]
    arguments += ["--prior-steps", "2", "--batch", "2", "--learning-rate", "1e-3", "--workers", "1"]
    plan = make_plan(parse(arguments, ""))
    [planned] = plan.subjects
    assert planned.run.prior is not None
    plan.store.add_backbone(plan.backbone)
    undisturbed(plan.store, [planned.run.prior], 4)
    TrainingSetEncoder(plan.store.root.uri)({"planned": pickle.dumps(planned)})
    return plan.store, planned.run


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_lane_compiles_once_and_trains_as_it_would_without(
    prepared: tuple[SubjectStore, RunSpec], monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    store, base = prepared
    # What a lane keeps is decided ahead of the backend, of which torch's own takes minutes.
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    worker = Worker(store, EVERY, lambda *_: None)

    def trained(name: str, *, compiled: bool) -> tuple[RunSpec, dict[str, Tensor]]:
        # Other samples of the finished model make it a run of its own; what is trained is the same.
        run = replace(base, training=replace(base.training, compile=compiled), sample_prompts=(name, backend))
        location_of(store, run).write_bytes(location_of(store, base).read_bytes())
        worker.train(0, run)
        found = final_checkpoint(store, run)
        assert found is not None
        return run, found.read()

    def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
        return [name for name in one if not torch.equal(one[name], other[name])]

    _, plain = trained("plain", compiled=False)
    torch.compiler.reset()
    counters.clear()
    first, weights = trained("first", compiled=True)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    assert max((weights[name] - plain[name]).abs().max().item() for name in plain) < 2e-4 * STEPS

    _, again = trained("second", compiled=True)
    assert counters["stats"]["unique_graphs"] == graphs
    assert differing(weights, again) == []

    final = checkpoint_folder(store, first) / f"{STEPS:08d}"
    final.delete()
    assert Checkpoint(EVERY, checkpoint_folder(store, first) / f"{EVERY:08d}").folder_files()
    worker.train(0, first)
    resumed = final_checkpoint(store, first)
    assert resumed is not None
    assert differing(weights, resumed.read()) == []
