"""Preemption notices: the state is safe before the workers go, and the weights tell nothing of it."""

from __future__ import annotations

import json
import os
import pickle
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution import context
from ray.train.v2._internal.execution.preemption import PreemptionContext

from dreambooth.runs import RunSpec
from dreambooth.store import SubjectStore
from pipelines.planning.options import parse
from pipelines.planning.plan import make_plan
from pipelines.stages.encode import TrainingSetEncoder
from pipelines.training.checkpoints import checkpoints, final_checkpoint
from pipelines.training.preemption import (
    ListeningTorchConfig,
    Preempted,
    PreemptionSignal,
    PreemptionWatcher,
    listen,
    ray_drains,
)
from pipelines.training.trainer import Worker
from pipelines.training.training_set import location_of
from tests.prior_sets import undisturbed
from tests.ranks import run_ranks

STEPS, EVERY = 16, 100


@pytest.fixture(scope="module")
def prepared(photos: Path, small_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SubjectStore, RunSpec]:
    """A run of two workers on a small SDXL, whose training set is in the store."""
    arguments = ["--images", str(photos), "--class-noun", "mug", "--backbone", str(small_sdxl), "--steps", str(STEPS)]
    arguments += ["--store", str(tmp_path_factory.mktemp("notice")), "--prior-images", "4", "--prior-batch", "4"]
    arguments += ["--prior-steps", "2", "--batch", "4", "--learning-rate", "1e-3", "--workers", "2"]
    plan = make_plan(parse(arguments, ""))
    [planned] = plan.subjects
    assert planned.run.prior is not None
    plan.store.add_backbone(plan.backbone)
    undisturbed(plan.store, [planned.run.prior], 4)
    TrainingSetEncoder(plan.store.root.uri)({"planned": pickle.dumps(planned)})
    return plan.store, planned.run


def train(rank: int, meeting: Path, store: SubjectStore, run: RunSpec, told: str, seen: Path) -> None:
    """One rank of a group, whose second is told something when it has done some steps."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    listen()
    told_at, marked, preempted = 0, 0, False

    def report(number: int, first: int, rows: list[dict[str, float]]) -> None:
        nonlocal told_at
        if rank == 1 and told and not told_at:
            told_at = first + len(rows) - 1
            if told == "SIGTERM":
                os.kill(os.getpid(), signal.SIGTERM)

    def mark_preempted() -> None:
        nonlocal marked
        marked += 1

    drained = lambda: told == "drain" and told_at > 0  # noqa: E731
    try:
        Worker(store, EVERY, report, drained=drained, mark_preempted=mark_preempted).train(0, run)
    except Preempted:
        preempted = True
    if rank == 1:
        seen.write_text(json.dumps([told_at, marked, preempted]))
    dist.barrier()
    os._exit(0)


def test_a_signal_is_followed_by_all_ranks_together_and_leaves_no_trace(
    prepared: tuple[SubjectStore, RunSpec], tmp_path: Path
) -> None:
    store, base = prepared

    def trained(run: RunSpec, told: str) -> tuple[int, int, bool]:
        location_of(store, run).write_bytes(location_of(store, base).read_bytes())
        run_ranks(train, (tmp_path / f"meeting-{told}", store, run, told, tmp_path / told), 2)
        return tuple(json.loads((tmp_path / told).read_text()))

    # Other samples of the finished model make them runs of their own; what is trained is the same.
    alone, disturbed = (replace(base, sample_prompts=(name,)) for name in ("alone", "disturbed"))
    assert trained(alone, "nothing") == (5, 0, False)
    assert trained(disturbed, "SIGTERM") == (5, 1, True)
    assert [found.step for found in checkpoints(store, disturbed)] == [7]
    assert trained(disturbed, "drain") == (12, 1, False)
    assert [found.step for found in checkpoints(store, disturbed)] == [14, STEPS]
    expected, weights = (final_checkpoint(store, run).read() for run in (alone, disturbed))  # type: ignore[union-attr]
    assert expected.keys() == weights.keys()
    assert [name for name in expected if not torch.equal(weights[name], expected[name])] == []


def hear_sigterm(config: dict[str, Any]) -> None:
    """A training loop that is sent SIGTERM."""
    watcher = PreemptionWatcher(drained=ray_drains)
    seen = [watcher.poll()]
    os.kill(os.getpid(), signal.SIGTERM)
    until = time.monotonic() + 100
    while seen[-1] is PreemptionSignal.NONE and time.monotonic() < until:
        time.sleep(0.1)
        seen.append(watcher.poll())
    Path(config["seen"]).write_text(seen[-1].name)


def test_workers_of_ray_train_take_sigterm_for_a_preemption_signal(local_ray: None, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    TorchTrainer(
        hear_sigterm,
        train_loop_config={"seen": str(seen)},
        torch_config=ListeningTorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(name="train", storage_path=str(tmp_path / "notes")),
    ).fit()
    assert seen.read_text() == "TERMINATED"


def test_what_ray_train_tells_of_drained_nodes_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Context:
        preemption_context = PreemptionContext()

    monkeypatch.setattr(context, "_train_context", Context())
    assert not ray_drains()
    Context.preemption_context.preemption_info = object()  # type: ignore[assignment]
    assert ray_drains()
