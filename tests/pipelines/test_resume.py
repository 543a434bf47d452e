"""SIGKILL to the driver in every stage, and the same command again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import ROOT


def start(store: Path, photos: Path, backbone: Path) -> subprocess.Popen[str]:
    command = f"{sys.executable} pipelines/personalize.py --images {photos} --class-noun mug --backbone {backbone}"
    command += f" --store {store} --prior-images 24 --prior-batch 4 --prior-steps 20 --batch 4 --steps 60"
    command += " --learning-rate 1e-3 --checkpoint-every 20 --workers 2 --sample-prompts {subject} --sample-steps 3"
    command += " --schedule cosine --warmup-steps 5 --ema-decay 0.9"
    # A session of its own: the kill must reach the driver alone, as an operator's would.
    return subprocess.Popen(
        command.split(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(store: Path, photos: Path, backbone: Path) -> str:
    process = start(store, photos, backbone)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def kill_when_there(store: Path, pattern: str, count: int, process: subprocess.Popen[str]) -> None:
    """Kill the driver as soon as `count` files of the store match."""
    while len(list(store.glob(pattern))) < count:
        assert process.poll() is None, f"ended before it could be killed:\n{process.communicate()[0]}"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def undisturbed(photos: Path, small_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a run that was never killed."""
    store = tmp_path_factory.mktemp("undisturbed")
    finish(store, photos, small_sdxl)
    return store


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
    undisturbed: Path, tmp_path: Path, photos: Path, small_sdxl: Path, stages: list[tuple[str, int]]
) -> None:
    made: list[dict[Path, int]] = []
    for pattern, count in stages:
        kill_when_there(tmp_path, pattern, count, start(tmp_path, photos, small_sdxl))
        made.append({path: path.stat().st_mtime_ns for path in tmp_path.glob("priors/*/*.parquet")})
    if stages[0] == PRIORS:
        assert 2 <= len(made[0]) < 6
    assert len(made[-1]) == 6
    for earlier in made:
        assert earlier.items() <= made[-1].items(), "a class-prior shard was made twice"
    assert list(tmp_path.glob("subjects/mug/versions/*/manifest.json")) == []

    finish(tmp_path, photos, small_sdxl)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("priors/*/*.parquet")} == made[-1]
    weights = "subjects/mug/versions/*/unet/diffusion_pytorch_model.safetensors"
    [expected], [resumed] = undisturbed.glob(weights), tmp_path.glob(weights)
    assert expected.relative_to(undisturbed) == resumed.relative_to(tmp_path)
    assert expected.read_bytes() == resumed.read_bytes()
    assert all(value.isfinite().all() for value in load_file(resumed).values())
