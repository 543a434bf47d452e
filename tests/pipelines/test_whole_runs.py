"""What is tried elsewhere piece by piece, in whole runs of the main job: rarer engines, and real photos."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from deepspeed.ops.op_builder import AsyncIOBuilder
from PIL import Image

from dreambooth.common.location import Location
from dreambooth.store import SubjectStore
from tests.pipelines.test_personalize import changed, draw_with_plain_diffusers, personalize, published_sample

pytestmark = pytest.mark.slow

ENGINES = {
    "adafactor": ["--optimizer", "adafactor", "--zero-stage", "0"],
    "settings of DeepSpeed's own": ["--deepspeed", "{folder}/deepspeed.json"],
    "weights and states on a disk": ["--zero-stage", "3", "--offload", "nvme", "--nvme-path", "{folder}/disk"],
}


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_trains_a_version_that_plain_diffusers_loads(
    engine: str, photos: Path, small_sdxl: Path, tmp_path: Path
) -> None:
    if "nvme" in ENGINES[engine] and not AsyncIOBuilder().is_compatible():
        pytest.skip("libaio's headers are absent: apt-get install libaio-dev")
    settings = {"zero_optimization": {"reduce_bucket_size": 12345}}
    (tmp_path / "deepspeed.json").write_text(json.dumps(settings))
    (tmp_path / "disk").mkdir()
    arguments = ["--images", photos, "--class-noun", "mug", "--backbone", small_sdxl, "--store", tmp_path / "store"]
    chosen = [argument.format(folder=tmp_path) for argument in ENGINES[engine]]
    done = personalize(*arguments, "--learning-rate", "1e-4", *chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    [version] = SubjectStore(tmp_path / "store").versions("mug")
    run = version.manifest["run"]
    said = (run["training"]["optimizer"], run["lane"]["deepspeed"], run["lane"]["offload"])
    assert (
        said
        == {
            "adafactor": ("adafactor", {}, "none"),
            "settings of DeepSpeed's own": ("adamw", settings, "none"),
            "weights and states on a disk": ("adamw", {}, "nvme"),
        }[engine]
    )
    assert all(changed(small_sdxl, version, "unet"))
    assert np.array_equal(draw_with_plain_diffusers(small_sdxl, version, 0), published_sample(version, 0))
    assert not any((tmp_path / "disk").iterdir())


def test_a_run_from_a_bucket_into_a_bucket_publishes_what_one_on_a_disk_does(
    bucket: Location, photos: Path, small_sdxl: Path, tmp_path: Path
) -> None:
    (bucket / "photos/mug").upload(photos)
    published = []
    for images, root in [(str(photos), Location.of(tmp_path)), ((bucket / "photos/mug").uri, bucket / "whole-run")]:
        done = personalize("--images", images, "--class-noun", "mug", "--backbone", small_sdxl, "--store", root.uri)
        assert done.returncode == 0, done.stdout + done.stderr
        [version] = SubjectStore(root).versions("mug")
        published.append((version.id, version.manifest["files"]))
    (local_id, local), (remote_id, remote) = published
    assert (local_id, local.keys()) == (remote_id, remote.keys())
    assert [name for name in local if local[name] != remote[name]] == []


FAMILIES = {
    "sdxl": (["--backbone", "{small_sdxl}"], 32),
    "stable-diffusion": (["--backbone", "{small_stable_diffusion}"], 32),
    "deepfloyd-if": (
        [
            *("--backbone", "{small_if}", "--super-resolution", "{small_if_super_resolution}"),
            *("--upscaler", "{small_upscaler}"),
        ],
        256,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_real_photos_go_through_every_family(
    family: str, dreambench: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    options, side = FAMILIES[family]
    named = [request.getfixturevalue(option[1:-1]) if option.startswith("{") else option for option in options]
    photos = dreambench / "subjects" / "dog"
    done = personalize("--images", photos, "--class-noun", "dog", *named, "--store", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    [version] = SubjectStore(tmp_path).versions("dog")
    assert version.manifest["backbone"]["family"] == family
    assert len(version.manifest["instance_images"]) == len(list(photos.glob("*.jpg"))) > 2
    folder = version.location.local
    assert folder is not None
    assert Image.open(folder / "contact_sheet.png").width > 1000
    samples = [Image.open(folder / sample["file"]) for sample in version.manifest["samples"]]
    assert {sample.size for sample in samples} == {(side, side)}
    assert all(np.asarray(sample).std() > 1 for sample in samples)
