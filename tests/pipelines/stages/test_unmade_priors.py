"""The main job when class-prior images cannot be made: the subject fails with the reason, and nothing is trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pipelines.personalize import main


@pytest.mark.slow
@pytest.mark.usefixtures("no_ray")
def test_the_subject_fails_and_says_which_images_could_not_be_made(
    photos: Path, small_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = Path(shutil.copytree(small_sdxl, tmp_path / "backbone"))
    decoder = backbone / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(decoder)
    weights["decoder.conv_in.weight"][0, 0] = float("inf")
    save_file(weights, decoder)
    arguments = ["--images", str(photos), "--class-noun", "mug", "--backbone", str(backbone), "--steps", "4"]
    arguments += ["--store", str(tmp_path / "store"), "--prior-images", "8", "--prior-batch", "4", "--prior-steps", "2"]
    arguments += ["--batch", "2", "--workers", "1"]
    assert main(arguments) == 1
    text = capsys.readouterr().out
    assert "mug FAILED: 'a mug' images" in text
    assert "not finite" in text
    assert "0 published, 1 failed" in text
    assert list(tmp_path.glob("store/runs/*/*")) == []
    assert list(tmp_path.glob("store/priors/*/*.parquet")) == []
