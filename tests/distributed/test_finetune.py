"""SIGKILL to workers at any moment: the lane goes on, and the weights are those of an undisturbed run."""

from __future__ import annotations

import os
import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dreambooth.runs import PlannedSubject, RunSpec
from dreambooth.store import SubjectStore
from pipelines.planning.options import parse
from pipelines.planning.plan import make_plan
from pipelines.runtime.console import Display
from pipelines.stages.encode import encode_training_sets
from pipelines.stages.finetune import finetune
from pipelines.stages.priors import generate_priors
from pipelines.stages.publish import publish
from pipelines.training.checkpoints import checkpoints, final_checkpoint
from pipelines.training.run_queue import TRIES
from pipelines.training.training_set import location_of
from tests.distributed.processes import processes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.usefixtures("local_ray")]

TRIALS = int(os.environ.get("TRIALS", "10"))
STEPS, EVERY = 60, 10


@pytest.fixture(scope="module")
def prepared(
    local_ray: None, photos: Path, small_sdxl: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SubjectStore, PlannedSubject]:
    return prepare(photos, small_sdxl, tmp_path_factory.mktemp("killed"))


def prepare(photos: Path, backbone: Path, store: Path) -> tuple[SubjectStore, PlannedSubject]:
    """A run of two workers, whose training set is in the store."""
    arguments = ["--images", str(photos), "--class-noun", "mug", "--backbone", str(backbone), "--steps", str(STEPS)]
    arguments += ["--store", str(store), "--prior-images", "4", "--prior-batch", "4"]
    arguments += ["--prior-steps", "2", "--batch", "4", "--learning-rate", "1e-3", "--workers", "2"]
    plan = make_plan(parse(arguments, ""))
    [planned] = plan.subjects
    assert planned.run.prior is not None
    plan.store.add_backbone(plan.backbone)
    generate_priors(plan.store, [(planned.run.prior, 4)], planned.run.lane, Display())
    encode_training_sets(plan.store, [planned], planned.run.lane, Display())
    return plan.store, planned


def variants(store: SubjectStore, base: RunSpec, zero_stage: int, names: list[str]) -> list[RunSpec]:
    """Runs that are trained alike: other samples of the finished model make them runs of their own."""
    lane = replace(base.lane, zero_stage=zero_stage)
    runs = [replace(base, lane=lane, sample_prompts=(name,)) for name in names]
    for run in runs:
        location_of(store, run).write_bytes(location_of(store, base).read_bytes())
    return runs


def kill_one_in_each(store: SubjectStore, runs: list[RunSpec], chance: random.Random, killed: list[int]) -> None:
    """During each run kill one of its workers, some time after one of its checkpoints."""
    for run in runs:
        after = chance.randrange(EVERY, STEPS - EVERY, EVERY)
        while not any(found.step >= after for found in checkpoints(store, run)):
            if final_checkpoint(store, run) is not None:
                return
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.3))
        chance.choice(processes("RayTrainWorker")).kill()
        killed.append(checkpoints(store, run)[-1].step)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_workers_killed_at_any_moment_leave_no_trace_in_the_weights(
    prepared: tuple[SubjectStore, PlannedSubject], zero_stage: int
) -> None:
    store, planned = prepared
    undisturbed, *disturbed = variants(store, planned.run, zero_stage, ["undisturbed", *map(str, range(TRIALS))])
    assert finetune(store, [undisturbed], EVERY, Display()) == {}
    killed: list[int] = []
    chance = random.Random(zero_stage)
    killer = threading.Thread(target=kill_one_in_each, args=(store, disturbed, chance, killed), daemon=True)
    killer.start()
    assert finetune(store, disturbed, EVERY, Display(), lanes=1) == {}
    killer.join()
    assert len(killed) == TRIALS
    expected = final_checkpoint(store, undisturbed)
    assert expected is not None
    weights = expected.read()
    for run in disturbed:
        checkpoint = final_checkpoint(store, run)
        assert checkpoint is not None
        trained = checkpoint.read()
        assert [name for name in weights if not torch.equal(trained[name], weights[name])] == []


def test_a_run_whose_workers_fail_each_time_is_given_up_and_the_lane_trains_the_next(
    prepared: tuple[SubjectStore, PlannedSubject],
) -> None:
    store, planned = prepared
    broken, good = variants(store, planned.run, 0, ["broken", "good"])
    location_of(store, broken).write_bytes(b"no training set")
    [(key, why)] = finetune(store, [broken, good], EVERY, Display(), lanes=1).items()
    assert key == broken.key
    assert why.startswith(f"its workers failed {TRIES} times, the last time so: ")
    assert final_checkpoint(store, broken) is None
    assert final_checkpoint(store, good) is not None


def test_a_publisher_that_dies_is_replaced(prepared: tuple[SubjectStore, PlannedSubject]) -> None:
    store, planned = prepared
    [run] = variants(store, planned.run, 0, ["published"])
    assert finetune(store, [run], EVERY, Display()) == {}
    assert final_checkpoint(store, run) is not None

    def kill_one() -> None:
        while not (drawing := processes("_Publisher.draw")):
            time.sleep(0.01)
        drawing[0].kill()

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    version = publish(store, replace(planned, run=run), Display())
    killer.join()
    assert (version.id, len(version.manifest["samples"])) == (run.version, len(run.sample_prompts))
