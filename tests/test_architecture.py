"""The arrows between the folders: what may import what, how long a module may be, and where each is tested."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

ARROWS = {
    "dreambooth": {
        "common": "",
        "objectives": "common",
        "subjects": "common",
        "embedded": "subjects",
        "backbones": "common objectives embedded",
        "sampling": "common backbones",
        "store": "common backbones",
        "methods": "common objectives subjects backbones",
        "runs": "common subjects backbones sampling methods",
        "versions": "common backbones sampling store methods runs",
        "memory": "subjects backbones methods",
        "metrics": "common subjects backbones sampling",
        "embedded.build": "common objectives subjects embedded backbones sampling metrics",
        "command": "",
        "__main__": "command",
    },
    "pipelines": {
        "runtime": "",
        "engine": "",
        "planning": "engine.config",
        "training": "runtime engine",
        "stages": "runtime training",
        "personalize": "runtime planning stages",
        "evaluate": "runtime planning stages",
    },
    "serve": {
        "config": "",
        "metrics": "",
        "request": "",
        "command_line": "config",
        "catalog": "",
        "api": "metrics request catalog",
        "engine": "metrics request",
        "ingress": "config metrics request catalog api",
        "preflight": "config catalog api",
        "keys": "command_line api",
        "app": "config catalog api engine ingress preflight",
        "command": "config command_line catalog preflight app",
    },
}
"""For each folder, or module beside the folders, what it may import of its own package: only what stands above it."""

BELOW = {"dreambooth": (), "pipelines": ("dreambooth",), "serve": ("dreambooth",)}
"""The packages that a package may import beside itself."""

LONGEST = 330
"""Lines of a module in `pipelines/`."""

TESTED_IN = {
    "dreambooth.__main__": "dreambooth/test_command.py",
    "dreambooth.backbones": "dreambooth/backbones/test_base.py",
    "dreambooth.backbones.files": "dreambooth/backbones/test_base.py",
    "dreambooth.backbones.precision": "dreambooth/backbones/test_presets.py",
    "dreambooth.backbones.sdxl": "dreambooth/backbones/test_base.py",
    "dreambooth.backbones.stable_diffusion": "dreambooth/backbones/test_base.py",
    "dreambooth.backbones.text": "dreambooth/backbones/test_base.py",
    "dreambooth.backbones.upscaler": "dreambooth/backbones/test_deepfloyd_if.py",
    "dreambooth.embedded": "dreambooth/embedded/test_weights.py",
    "dreambooth.embedded.backgrounds": "dreambooth/embedded/test_scenes.py",
    "dreambooth.embedded.instances": "dreambooth/embedded/test_scenes.py",
    "dreambooth.embedded.outfits": "dreambooth/embedded/test_scenes.py",
    "dreambooth.embedded.vocabulary": "dreambooth/embedded/test_scenes.py",
    "dreambooth.embedded.build.*": "dreambooth/embedded/build/test_stages.py",
    "dreambooth.methods": "dreambooth/methods/test_base.py",
    "dreambooth.methods.dreambooth": "pipelines/training/test_train_step.py",
    "dreambooth.metrics": "dreambooth/metrics/test_scores.py",
    "dreambooth.objectives": "dreambooth/objectives/test_variance_preserving.py",
    "dreambooth.objectives.base": "dreambooth/objectives/test_variance_preserving.py",
    "dreambooth.store": "dreambooth/store/test_subject_store.py",
    "dreambooth.versions": "dreambooth/versions/test_forms.py",
    "dreambooth.versions.base": "dreambooth/versions/test_forms.py",
    "dreambooth.versions.components": "dreambooth/versions/test_forms.py",
    "dreambooth.versions.learned_embeds": "dreambooth/versions/test_forms.py",
    "dreambooth.versions.pipeline": "pipelines/test_personalize.py",
    "pipelines.engine.optimizers": "pipelines/engine/test_engine.py",
    "pipelines.planning.settings": "pipelines/planning/test_plan.py",
    "pipelines.planning.workers": "pipelines/planning/test_validation.py",
    "pipelines.runtime.ray_session": "pipelines/test_job.py",
    "pipelines.runtime.starts": "pipelines/runtime/test_actor_pools.py",
    "pipelines.stages.encode": "pipelines/training/test_training_set.py",
    "pipelines.stages.previews": "pipelines/stages/test_finetune.py",
    "pipelines.stages.publish": "pipelines/test_personalize.py",
    "pipelines.stages.score": "pipelines/test_evaluate.py",
    "pipelines.training.batches": "pipelines/training/test_training_set.py",
    "pipelines.training.checkpoints": "pipelines/engine/test_world_size.py",
    "pipelines.training.host_tensors": "pipelines/training/test_setup.py",
    "pipelines.training.measures": "pipelines/test_personalize.py",
    "pipelines.training.trainer": "pipelines/training/test_setup.py",
    "serve.api.errors": "serve/api/test_routes.py",
    "serve.api.protocol": "serve/api/test_routes.py",
    "serve.catalog.index": "serve/catalog/test_catalog.py",
    "serve.command_line": "serve/test_command.py",
    "serve.ingress.ingress": "serve/test_app.py",
    "serve.metrics": "cluster/test_dashboard.py",
    "serve.request": "serve/engine/test_scheduler.py",
}
"""The tests of a module, or of all in a folder, that have no file of its name."""


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def modules(package: str) -> dict[str, Path]:
    """The package's modules by their full names."""
    return {name_of(path): path for path in sorted((ROOT / package).rglob("*.py"))}


def imported(source: str, module: str) -> Iterator[str]:
    """The full names that a module's source imports anywhere, in functions too: `a.b` for `from a import b`.

    `module` ends in `.__init__` where it is a package.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = [*package, *([node.module] if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__"):
                yield str(node.args[0].value)


@cache
def imports_of(path: Path) -> list[str]:
    return list(imported(path.read_text(), ".".join(path.relative_to(ROOT).with_suffix("").parts)))


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def place_of(name: str) -> str:
    """The innermost place of `ARROWS` that a full name lies in; "" for the package itself."""
    package, _, rest = name.partition(".")
    return max((place for place in ARROWS[package] if within(rest, place)), key=len, default="")


def test_no_import_escapes() -> None:
    source = """
import ray.data as data, json
from pipelines.planning import plan
def later():
    from ray import train
    import importlib
    importlib.import_module("serve.app")
    __import__("ray")
    from .. import pipelines
    from ..serve.app import router
    from . import base
"""
    assert set(imported(source, "dreambooth.module")) == {
        "ray.data", "json", "pipelines.planning.plan", "ray.train", "importlib", "serve.app", "ray", "pipelines",
        "serve.app.router", "dreambooth.base",
    }  # fmt: skip


@pytest.mark.parametrize("package", ARROWS)
def test_every_place_has_its_line_and_arrows_point_up_the_table_alone(package: str) -> None:
    places = {name.split(".")[1] for name in modules(package) if "." in name}
    assert {place.split(".")[0] for place in ARROWS[package]} == places
    above: list[str] = []
    for place, allowed in ARROWS[package].items():
        assert (ROOT / package / place.replace(".", "/")).is_dir() or f"{package}.{place}" in modules(package)
        assert [arrow for arrow in allowed.split() if place_of(f"{package}.{arrow}") not in above] == []
        above.append(place)


@pytest.mark.parametrize("package", ARROWS)
def test_places_import_what_their_line_allows(package: str) -> None:
    wrong = []
    for name, path in modules(package).items():
        place = place_of(name)
        allowed = [f"{package}.{one}" for one in (place, *ARROWS[package].get(place, "").split())]
        for found in imports_of(path):
            if within(found, package) and place_of(found):
                # A folder's line is not that of a folder inside it which has one of its own.
                fits = within(found, *allowed) and place_of(found) in map(place_of, allowed)
                wrong += [] if fits else [f"{name} imports {found}"]
    assert wrong == []


@pytest.mark.parametrize("package", ARROWS)
def test_packages_import_those_below_alone(package: str) -> None:
    others = {*ARROWS, "tests", *(["ray", "deepspeed"] if package == "dreambooth" else [])}
    others -= {package, *BELOW[package]}
    wrong = [f"{name} imports {found}" for name, path in modules(package).items() for found in imports_of(path)
             if within(found, *others)]  # fmt: skip
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    every = {name: path for package in ARROWS for name, path in modules(package).items()}

    def module(name: str) -> str:
        while name not in every:
            name = name.rpartition(".")[0]
        return name

    found = {
        name: {module(one) for one in imports_of(path) if within(one, *ARROWS)} - {name} for name, path in every.items()
    }
    assert sum(map(len, found.values())) > len(every)
    list(TopologicalSorter(found).static_order())  # CycleError names those of a circle


@pytest.mark.parametrize("path", modules("pipelines").values(), ids=name_of)
def test_modules_of_the_jobs_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST


def test_every_module_has_a_test_file_of_its_name_or_is_listed_with_the_one_that_tests_it() -> None:
    used, missing = set(), []
    for package in ARROWS:
        for name, path in modules(package).items():
            if path.name == "__init__.py" and len(ast.parse(path.read_text()).body) == 1:
                continue  # a docstring
            *parents, last = path.relative_to(ROOT).with_suffix("").parts
            if (ROOT / "tests").joinpath(*parents, f"test_{last.strip('_')}.py").exists():
                continue
            listed = [entry for entry in TESTED_IN if fnmatch(name, entry)]
            used |= set(listed)
            missing += [] if listed else [name]
    assert missing == []
    assert set(TESTED_IN) - used == set(), "lines that are not needed"
    assert [file for file in TESTED_IN.values() if not (ROOT / "tests" / file).exists()] == []


@pytest.mark.long
def test_the_whole_method_can_be_imported_without_ray() -> None:
    names = [name for name in modules("dreambooth") if not name.endswith("__main__")]
    assert "dreambooth.store" in names
    program = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
print(*sorted({{name.split(".")[0] for name in sys.modules}} & {{"ray", "pipelines", "serve", "deepspeed"}}))
"""
    output = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert output.stdout.split() == []
