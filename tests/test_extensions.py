"""A family, a method and a version form of somebody's own: a file and a registration each, from plan to served image.

The test does what CONTRIBUTING.md says, on a copy of the packages.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.small_models import write_stable_diffusion

REGISTRATIONS = {
    "family": (
        "dreambooth/backbones/__init__.py",
        "from dreambooth.backbones.perturbed_attention import PerturbedAttention\n",
        ("(StableDiffusion, SDXL,", "(PerturbedAttention, StableDiffusion, SDXL,"),
    ),
    "method": (
        "dreambooth/methods/__init__.py",
        "from dreambooth.methods.partial import Partial\n",
        ("(DreamBooth(), ", "(Partial(), DreamBooth(), "),
    ),
    "form": (
        "dreambooth/versions/__init__.py",
        "from dreambooth.versions.differences import Differences\n",
        ("(Components(), ", "(Differences(), Components(), "),
    ),
}

PROGRAM = """
import base64, json, sys, urllib.request

import ray
import torch
from ray import serve

from dreambooth.sampling.sampler import load_pipeline, sample
from dreambooth.store import SubjectStore
from dreambooth.versions.pipeline import VersionPipeline, published_samplers
from pipelines.personalize import main
from serve.app import app
from serve.config import ServeConfig

store, images, port, *arguments = sys.argv[1:]
assert main([*arguments, "--dry-run"]) == 0
assert main(arguments) == 0
[version] = SubjectStore(store).versions("mug")
ray.init(address="local", num_cpus=2, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
serve.run(app(ServeConfig(store=store, without_keys=True)))
body = {"model": "mug", "prompt": "a {subject} in the snow", "seed": 5}
request = urllib.request.Request(
    f"http://127.0.0.1:{port}/v1/images/generations",
    json.dumps(body).encode(),
    {"Content-Type": "application/json"},
)
with urllib.request.urlopen(request, timeout=100) as response:
    [answer] = json.load(response)["data"]
serve.shutdown()
ray.shutdown()
with open(f"{images}/served.png", "wb") as file:
    file.write(base64.b64decode(answer["b64_json"]))
[settings] = published_samplers(version)
prompt = [answer["revised_prompt"]]
[image] = VersionPipeline.of_version(SubjectStore(store), version, [settings]).draw(prompt, [5])
image.save(f"{images}/drawn.png")
backbone = SubjectStore(store).open_backbone(version.manifest["backbone"]["hash"])
[image] = sample(load_pipeline(backbone, settings, torch.device("cpu")), prompt, [5], settings)
image.save(f"{images}/untrained.png")
"""


def register(copy: Path, kind: str) -> None:
    """Put the extension where its kind lies, and name it in the registry there."""
    registry, line, (before, after) = REGISTRATIONS[kind]
    module = line.split()[1].replace(".", "/")
    shutil.copy(ROOT / "tests" / "extensions" / f"{kind}.py", copy / f"{module}.py")
    text = (copy / registry).read_text()
    assert text.count(before) == 1
    first = text.index("from dreambooth.")
    (copy / registry).write_text((text[:first] + line + text[first:]).replace(before, after))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The packages with the three extensions."""
    folder = tmp_path / "project"
    for package in ("dreambooth", "pipelines", "serve"):
        ignored = shutil.ignore_patterns("weights", "__pycache__")
        shutil.copytree(ROOT / package, folder / package, ignore=ignored)
    (folder / "dreambooth" / "embedded" / "weights").symlink_to(ROOT / "dreambooth" / "embedded" / "weights")
    for kind in REGISTRATIONS:
        register(folder, kind)
    return folder


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    """A small model of the new family."""
    folder = write_stable_diffusion(tmp_path / "backbone")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionPAGPipeline"}))
    return folder


def test_a_family_a_method_and_a_form_go_from_plan_to_served_image(
    copy: Path, backbone: Path, photos: Path, tmp_path: Path, free_port: int
) -> None:
    store = tmp_path / "store"
    arguments = ["--images", photos, "--class-noun", "mug", "--backbone", backbone, "--store", store, "--workers", "1"]
    arguments += ["--method", "partial", "--method-settings", "word=attn2.to_k", "--prior-batch", "4"]
    command = [sys.executable, "-c", PROGRAM, store, tmp_path, free_port, *arguments]
    run = subprocess.run(list(map(str, command)), cwd=copy, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-5000:]
    assert "perturbed-attention" in run.stdout

    [manifest] = [json.loads(path.read_text()) for path in store.glob("subjects/mug/versions/*/manifest.json")]
    assert (manifest["form"], manifest["components"]) == ("differences", ["differences"])
    assert manifest["backbone"]["family"] == "perturbed-attention"
    training = manifest["run"]["training"]
    assert (training["method"], training["method_settings"]) == ("partial", {"word": "attn2.to_k"})
    assert training["steps"] == 7  # the family's preset

    names = ("served", "drawn", "untrained")
    served, drawn, untrained = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in names)
    assert np.array_equal(served, drawn)
    assert not np.array_equal(served, untrained)
