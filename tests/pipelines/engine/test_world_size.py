"""A run goes on with another number of workers: same samples, same weights but for rounding, at every ZeRO stage."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dreambooth.runs import RunSpec
from dreambooth.store import SubjectStore
from pipelines.planning.options import parse
from pipelines.planning.plan import make_plan
from pipelines.stages.encode import TrainingSetEncoder
from pipelines.training.checkpoints import final_checkpoint, last_checkpoint
from pipelines.training.trainer import Worker
from pipelines.training.training_set import location_of
from tests.prior_sets import undisturbed
from tests.ranks import run_ranks

STEPS, EVERY = 9, 3
Losses = dict[int, tuple[float, float]]
"""Instance and prior term by step."""
State = dict[str, torch.Tensor]
TrainedBy = Callable[..., tuple[State, Losses]]


class Lost(Exception):
    """The workers are gone."""


@pytest.fixture(scope="module")
def prepared(photos: Path, small_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SubjectStore, RunSpec]:
    """A run for three workers on a small SDXL, whose training set is in the store."""
    arguments = ["--images", str(photos), "--class-noun", "mug", "--backbone", str(small_sdxl), "--steps", str(STEPS)]
    arguments += ["--store", str(tmp_path_factory.mktemp("world")), "--prior-images", "4", "--prior-batch", "4"]
    arguments += ["--prior-steps", "2", "--batch", "6", "--learning-rate", "1e-3", "--workers", "3"]
    plan = make_plan(parse(arguments, ""))
    [planned] = plan.subjects
    assert planned.run.prior is not None
    plan.store.add_backbone(plan.backbone)
    undisturbed(plan.store, [planned.run.prior], 4)
    TrainingSetEncoder(plan.store.root.uri)({"planned": pickle.dumps(planned)})
    return plan.store, planned.run


def train(rank: int, world: int, meeting: Path, store: SubjectStore, run: RunSpec, until: int, seen: Path) -> None:
    """One rank of a group of workers that is lost once step `until` and the checkpoint after it are done."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    losses: Losses = {}

    def report(number: int, first: int, rows: list[dict[str, float]]) -> None:
        losses.update({first + n: (row["loss/instance"], row["loss/prior"]) for n, row in enumerate(rows)})
        torch.save(losses, seen)
        if first > until:
            dist.barrier()
            while (last := last_checkpoint(store, run)) is None or last.step < until:
                time.sleep(0.01)
            raise Lost

    try:
        Worker(store, EVERY, report).train(0, run)
    except Lost:
        os._exit(0)


@pytest.fixture
def trained_by(prepared: tuple[SubjectStore, RunSpec], tmp_path: Path) -> TrainedBy:
    """Trains the prepared run with these many workers for three steps each; gives weights and losses."""

    def trained_by(zero_stage: int, *worlds: int) -> tuple[State, Losses]:
        store, base = prepared
        # Other samples of the finished model make it a run of its own; what is trained is the same.
        run = replace(base, lane=replace(base.lane, zero_stage=zero_stage), sample_prompts=(str(worlds),))
        location_of(store, run).write_bytes(location_of(store, base).read_bytes())
        losses: Losses = {}
        for number, world in enumerate(worlds):
            name = f"{zero_stage}-{'-'.join(map(str, worlds))}-{number}"
            until = EVERY * (number + 1) if number + 1 < len(worlds) else STEPS
            arguments = (world, tmp_path / name, store, run, until, tmp_path / f"{name}.pt")
            run_ranks(train, arguments, world)
            for step, loss in torch.load(tmp_path / f"{name}.pt").items():
                losses[step] = loss
        final = final_checkpoint(store, run)
        assert final is not None
        return final.read(), losses

    return trained_by


OTHERS = [(1, (2, 1, 2)), (3, (2, 1, 2)), (1, (3, 2, 1)), (2, (3, 2, 1)), (3, (3, 2, 1))]


@pytest.mark.parametrize(
    ("zero_stage", "worlds"), [(2, (2, 1, 2)), *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS)]
)
def test_the_weights_do_not_depend_on_how_many_workers_were_left(
    trained_by: TrainedBy, zero_stage: int, worlds: tuple[int, ...]
) -> None:
    expected, undisturbed = trained_by(zero_stage, max(worlds))
    weights, losses = trained_by(zero_stage, *worlds)
    assert losses.keys() == undisturbed.keys() == set(range(1, STEPS + 1))
    for step, terms in undisturbed.items():
        assert losses[step] == pytest.approx(terms, rel=1e-3)
    # Adam's steps have size lr whatever the gradient: rounding in near-zero gradients shows up to this size.
    assert max((weights[name] - expected[name]).abs().max().item() for name in expected) < STEPS * 2e-4
