"""SIGKILL to the driver in every stage, and the same command again."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.pipelines.whole_run import WholeRun


def kill_when_there(run: WholeRun, pattern: str, count: int) -> None:
    """Start the run, and kill its driver as soon as `count` files of the store match."""
    process = run.start()
    while len(list(run.store.glob(pattern))) < count:
        assert process.poll() is None, f"ended before it could be killed:\n{process.communicate()}"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


pytestmark = pytest.mark.usefixtures("no_ray")

PRIORS, ENCODE = ("priors/*/*.parquet", 2), ("runs/*/training_set.safetensors", 1)
FINETUNE = ("runs/*/checkpoints/*/checkpoint.json", 1)
SAMPLE = ("runs/*/checkpoints/00000060/checkpoint.json", 1)


@pytest.mark.parametrize(
    "stages",
    [
        pytest.param([FINETUNE], id="while-training"),
        pytest.param([PRIORS, ENCODE, FINETUNE, SAMPLE], id="in-every-stage", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_in_the_weights_of_an_undisturbed_one(
    undisturbed_run: WholeRun, tmp_path: Path, stages: list[tuple[str, int]]
) -> None:
    run = replace(undisturbed_run, store=tmp_path)
    made: list[dict[Path, int]] = []
    for pattern, count in stages:
        kill_when_there(run, pattern, count)
        made.append({path: path.stat().st_mtime_ns for path in tmp_path.glob("priors/*/*.parquet")})
    if stages[0] == PRIORS:
        assert 2 <= len(made[0]) < 6
    assert len(made[-1]) == 6
    for earlier in made:
        assert earlier.items() <= made[-1].items(), "a class-prior shard was made twice"
    assert list(tmp_path.glob("subjects/mug/versions/*/manifest.json")) == []

    run.finish()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("priors/*/*.parquet")} == made[-1]
    weights = "subjects/mug/versions/*/unet/diffusion_pytorch_model.safetensors"
    [expected], [resumed] = undisturbed_run.store.glob(weights), tmp_path.glob(weights)
    assert expected.relative_to(undisturbed_run.store) == resumed.relative_to(tmp_path)
    assert expected.read_bytes() == resumed.read_bytes()
    assert all(value.isfinite().all() for value in load_file(resumed).values())
