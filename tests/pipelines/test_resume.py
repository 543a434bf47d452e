"""SIGKILL to the driver in every stage, and the same command again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

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


def kill_when(reached: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not reached():
        assert process.poll() is None, f"ended before it could be killed:\n{process.communicate()[0]}"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def test_a_run_killed_in_every_stage_ends_in_the_weights_of_an_undisturbed_one(
    tmp_path: Path, photos: Path, small_sdxl: Path
) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish(undisturbed, photos, small_sdxl)

    def kill_at(pattern: str, count: int = 1) -> dict[Path, int]:
        kill_when(lambda: len(list(killed.glob(pattern))) >= count, start(killed, photos, small_sdxl))
        return {path: path.stat().st_mtime_ns for path in killed.glob("priors/*/*.parquet")}

    after_priors = kill_at("priors/*/*.parquet", 2)
    assert 2 <= len(after_priors) < 6
    after_encode = kill_at("runs/*/training_set.safetensors")
    after_checkpoint = kill_at("runs/*/finetune/checkpoint_*/checkpoint.json")
    after_training = kill_at("runs/*/trained.json")
    assert len(after_training) == 6
    for earlier in (after_priors, after_encode, after_checkpoint):
        assert earlier.items() <= after_training.items(), "a class-prior shard was made twice"
    assert list(killed.glob("subjects/mug/versions/*/manifest.json")) == []

    finish(killed, photos, small_sdxl)
    weights = "subjects/mug/versions/*/unet/diffusion_pytorch_model.safetensors"
    [expected], [resumed] = undisturbed.glob(weights), killed.glob(weights)
    assert expected.relative_to(undisturbed) == resumed.relative_to(killed)
    assert expected.read_bytes() == resumed.read_bytes()
    assert all(value.isfinite().all() for value in load_file(resumed).values())
