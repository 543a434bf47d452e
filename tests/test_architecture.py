"""The direction of the arrows: what may import what."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(source: str, module: str) -> Iterator[str]:
    """The full names that a module's source imports anywhere, in functions too: `a.b` for `from a import b`."""
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


def imports_of(path: Path) -> list[str]:
    return list(imported(path.read_text(), ".".join(path.relative_to(ROOT).with_suffix("").parts)))


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_no_import_escapes() -> None:
    source = """
import ray.data as data, json
from pipelines import plan
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


@pytest.mark.parametrize("path", modules("dreambooth"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_method_imports_no_ray_and_nothing_that_builds_on_it(path: Path) -> None:
    assert [name for name in imports_of(path) if within(name, "ray", "pipelines", "serve", "tests")] == []


@pytest.mark.parametrize("path", modules("pipelines"), ids=lambda path: str(path.relative_to(ROOT)))
def test_pipelines_do_not_import_serving(path: Path) -> None:
    assert [name for name in imports_of(path) if within(name, "serve", "tests")] == []


def test_serving_meets_the_pipelines_in_personalize_alone() -> None:
    for path in modules("serve"):
        names = [name for name in imports_of(path) if within(name, "pipelines", "tests")]
        assert [name for name in names if not within(name, "pipelines.personalize")] == [], path


def test_the_whole_method_can_be_imported_without_ray() -> None:
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules("dreambooth")]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    assert "dreambooth.store" in names
    program = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
print(*sorted({{name.split(".")[0] for name in sys.modules}} & {{"ray", "pipelines", "serve", "deepspeed"}}))
"""
    output = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert output.stdout.split() == []
