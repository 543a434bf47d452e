"""The main job, from the command line: photos in, a published model out that plain diffusers loads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dreambooth.store import SubjectStore, Version
from dreambooth.versions.pipeline import VersionPipeline, published_samplers
from pipelines.personalize import main
from tests.conftest import ROOT
from tests.pipelines.whole_run import WholeRun

pytestmark = pytest.mark.usefixtures("no_ray")

SHORT = "--steps 6 --batch 2 --workers 2 --prior-images 4 --prior-batch 4 --prior-steps 3 --sample-steps 3"


def personalize(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "pipelines/personalize.py", *map(str, arguments), *SHORT.split()]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)


def draw_with_plain_diffusers(backbone: Path, version: Version, number: int) -> np.ndarray:
    """Sample `number` of a version again, by nothing but diffusers, transformers and the published files."""
    assert version.location.local is not None
    index = json.loads((backbone / "model_index.json").read_text())
    networks = {}
    for component in version.components:
        library = diffusers if index[component][0] == "diffusers" else transformers
        kind = getattr(library, index[component][1])
        networks[component] = kind.from_pretrained(version.location.local / component)
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(backbone, **networks)
    sample = version.manifest["samples"][number]
    torch.set_num_threads(1)
    drawn = pipeline(
        prompt=sample["prompt"],
        num_inference_steps=version.manifest["run"]["samples"]["steps"],
        guidance_scale=version.manifest["run"]["samples"]["guidance"],
        generator=torch.Generator().manual_seed(sample["seed"]),
    )
    return np.asarray(drawn.images[0])


def published_sample(version: Version, number: int) -> np.ndarray:
    assert version.location.local is not None
    return np.asarray(Image.open(version.location.local / version.manifest["samples"][number]["file"]))


def redrawn(version: Version, number: int) -> np.ndarray:
    """A published sample, drawn again from nothing but the version and its store."""
    assert version.location.local is not None
    store = SubjectStore(version.location.local.parents[3])
    sample = version.manifest["samples"][number]
    model = VersionPipeline.of_version(store, version, published_samplers(version))
    [image] = model.draw([sample["prompt"]], [sample["seed"]])
    return np.asarray(image)


def changed(backbone: Path, version: Version, component: str) -> list[bool]:
    """For each published tensor of a component, whether it differs from the backbone's."""
    assert version.location.local is not None
    [published] = (version.location.local / component).glob("*.safetensors")
    [original] = (backbone / component).glob("*.safetensors")
    before, after = load_file(original), load_file(published)
    assert before.keys() == after.keys()
    return [not torch.equal(before[name], after[name]) for name in after]


def test_a_stable_diffusion_folder_becomes_a_version_that_plain_diffusers_loads(
    undisturbed_run: WholeRun, small_stable_diffusion: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, said = undisturbed_run.store, undisturbed_run.output
    assert "1 published, 0 failed" in said
    assert f"dreambooth serve --without-keys --store {store}" in said
    [version] = SubjectStore(store).versions("mug")
    assert version.components == ["unet"]
    assert all(changed(small_stable_diffusion, version, "unet"))
    for number in (0, 3):
        plain = draw_with_plain_diffusers(small_stable_diffusion, version, number)
        assert np.array_equal(plain, published_sample(version, number))
        assert np.array_equal(redrawn(version, number), published_sample(version, number))
    assert version.location.local is not None
    assert Image.open(version.location.local / "contact_sheet.png").width > 1000
    [events] = store.glob("runs/*/tensorboard/events.*")
    seen = EventAccumulator(str(events.parent)).Reload()
    steps = version.manifest["run"]["training"]["steps"]
    losses = ("loss/instance", "loss/prior")
    for measure in (*losses, "gradient_norm", "learning_rate", "samples_per_second", "memory_gib"):
        assert [point.step for point in seen.Scalars(measure)] == list(range(1, steps + 1))
        assert all(point.value > 0 for point in seen.Scalars(measure))
    assert main(undisturbed_run.arguments) == 0
    assert "is published already: nothing to do" in capsys.readouterr().out
    # What the libraries below have to say goes to files.
    assert undisturbed_run.errors == ""
    assert "INFO" not in said
    assert "WARNING" not in said


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 3])
def test_textual_inversion_publishes_a_few_kilobytes_that_diffusers_reads(
    photos: Path, small_sdxl: Path, tmp_path: Path, zero_stage: int
) -> None:
    arguments = ["--method", "textual-inversion", "--images", photos, "--class-noun", "mug", "--backbone", small_sdxl]
    done = personalize(*arguments, "--store", tmp_path, "--zero-stage", str(zero_stage))
    assert done.returncode == 0, done.stdout + done.stderr
    [version] = SubjectStore(tmp_path).versions("mug")
    assert version.components == ["learned_embeds"]
    assert version.location.local is not None
    folder = version.location.local / "learned_embeds"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4096
    identifier, sample = version.manifest["identifier"], version.manifest["samples"][1]
    assert version.manifest["instance_prompt"] == f"a {identifier}"
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(small_sdxl)
    for encoder, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        parts = {"text_encoder": getattr(pipeline, encoder), "tokenizer": getattr(pipeline, tokenizer)}
        pipeline.load_textual_inversion(str(folder), weight_name=f"{encoder}.safetensors", token="<mug>", **parts)
    drawn = pipeline(
        prompt=sample["prompt"].replace(identifier, "<mug>"),
        num_inference_steps=version.manifest["run"]["samples"]["steps"],
        guidance_scale=version.manifest["run"]["samples"]["guidance"],
        generator=torch.Generator().manual_seed(sample["seed"]),
        output_type="np",
    )
    assert np.abs(drawn.images[0] - published_sample(version, 1) / 255).max() < 0.01
    assert np.array_equal(redrawn(version, 1), published_sample(version, 1))
    assert not list(tmp_path.glob("priors/*"))


@pytest.mark.slow
def test_captions_views_buckets_and_a_teacher_go_into_a_version_together(
    photos: Path, small_sdxl: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(photos, tmp_path / "mug"))
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"a {{subject}} on table {number}")
    done = personalize(
        *("--images", folder, "--class-noun", "mug", "--backbone", small_sdxl, "--store", tmp_path / "store"),
        *("--captions", "--flip", "--random-crop", "--buckets", "--prior-kind", "teacher", "--learning-rate", "1e-4"),
        *("--train-text-encoder", "--zero-stage", "3", "--sample-prompts", "{subject} in the snow"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [version] = SubjectStore(tmp_path / "store").versions("mug")
    run = version.manifest["run"]
    assert run["captions"] == [f"a {run['identifier']} mug on table {number}" for number in range(3)]
    assert version.components == ["text_encoder", "text_encoder_2", "unet"]
    assert all(changed(small_sdxl, version, "unet"))
    [events] = (tmp_path / "store").glob("runs/*/tensorboard/events.*")
    seen = EventAccumulator(str(events.parent)).Reload()
    # Until the first update the network is its own teacher.
    first, *later = (point.value for point in seen.Scalars("loss/prior"))
    assert first < 1e-10
    assert all(value > 1e-9 for value in later)
    assert np.array_equal(draw_with_plain_diffusers(small_sdxl, version, 0), published_sample(version, 0))
    assert np.array_equal(redrawn(version, 0), published_sample(version, 0))


@pytest.fixture
def manifest(dreambench: Path, tmp_path: Path) -> Path:
    """Three subjects with real photos, one of them at its original size; the second has a corrupt photo."""
    broken = tmp_path / "backpack"
    broken.mkdir()
    for photo in (dreambench / "subjects" / "backpack").glob("*.jpg"):
        (broken / photo.name).write_bytes(photo.read_bytes())
    (broken / "02.jpg").write_bytes((broken / "02.jpg").read_bytes()[:5000])
    path = tmp_path / "subjects.yaml"
    path.write_text(
        "subjects:\n"
        f"  - {{name: dog, images: ['{dreambench}/subjects/dog'], class_noun: dog}}\n"
        f"  - {{name: backpack, images: ['{broken}'], class_noun: backpack}}\n"
        f"  - {{name: sneaker, images: ['{dreambench}/originals/colorful_sneaker'], class_noun: sneaker}}\n"
    )
    return path


def test_in_a_manifest_a_subject_with_a_corrupt_photo_leaves_the_others_alone(
    manifest: Path, small_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = SubjectStore(tmp_path / "store")
    arguments = ["--manifest", manifest, "--backbone", small_sdxl, "--store", store.root, "--train-text-encoder"]
    assert main([*map(str, arguments), "--sample-prompts", "{subject} in the snow", *SHORT.split()]) == 1
    said = capsys.readouterr().out
    assert "2 published, 1 failed  backpack" in said
    assert "02.jpg" in said
    assert store.versions("backpack") == []
    identifiers = set()
    for subject in ("dog", "sneaker"):
        [version] = store.versions(subject)
        assert version.components == ["text_encoder", "text_encoder_2", "unet"]
        assert all(changed(small_sdxl, version, "unet"))
        # The last layer's output is not used by the penultimate hidden states of the first encoder.
        assert any(changed(small_sdxl, version, "text_encoder"))
        assert any(changed(small_sdxl, version, "text_encoder_2"))
        plain = draw_with_plain_diffusers(small_sdxl, version, 0)
        assert np.array_equal(plain, published_sample(version, 0))
        identifiers.add(version.manifest["identifier"])
    assert len(identifiers) == 2


def test_more_workers_than_this_machine_has_is_bad_input(
    photos: Path, small_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--images", photos, "--class-noun", "mug", "--backbone", small_sdxl, "--store", tmp_path]
    assert main([*map(str, arguments), "--cpus-per-worker", "1000", *SHORT.split()]) == 2
    assert "--workers 2 needs 2000 CPUs" in capsys.readouterr().err
    assert list(tmp_path.glob("*/*/*")) == []
