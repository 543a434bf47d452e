"""The scripts import from the project's root, wherever they are started, and so do Ray's workers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# What `python pipelines/NAME.py` does, and then a look at what it left.
STARTED = """
import importlib.util, runpy, sys
script, folder = sys.argv[1], sys.argv[1].rpartition("/")[0]
sys.path[0] = folder
sys.argv = [script, "--help"]
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as exit_:
    assert exit_.code == 0
assert folder not in sys.path, sys.path
for name in ("planning", "engine", "training", "runtime", "stages", "evaluate", "personalize"):
    assert importlib.util.find_spec(name) is None, name
import pipelines
print("pipelines is in", pipelines.__path__[0])
"""

WORKERS = """
import ray
from dreambooth.runs import Resources
from pipelines.runtime.ray_session import ray_session

def look():
    import importlib.util, sys
    import pipelines.planning
    bare = [name for name in ("planning", "engine", "evaluate") if importlib.util.find_spec(name) is not None]
    return sys.path, bare, pipelines.__path__[0]

with ray_session(Resources(1, 1, 0.0), verbose=False):
    path, bare, found = ray.get(ray.remote(look).remote())
assert folder not in path, path
assert bare == [], bare
print("workers' pipelines is in", found)
"""


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The project's packages in another place than the one that is installed."""
    for package in ("dreambooth", "pipelines"):
        ignored = shutil.ignore_patterns("__pycache__", "subjects/*")
        shutil.copytree(ROOT / package, tmp_path / "project" / package, ignore=ignored)
    return tmp_path / "project"


def start(script: Path, program: str, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RAY_ADDRESS")}
    command = [sys.executable, "-c", program, str(script)]
    started = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert started.returncode == 0, started.stdout + started.stderr
    return started.stdout


def test_neither_the_driver_nor_workers_find_modules_by_their_bare_names(copied: Path, tmp_path: Path) -> None:
    told = start(copied / "pipelines" / "personalize.py", STARTED + WORKERS, tmp_path)
    assert told.startswith("usage: personalize.py")
    assert f"\npipelines is in {copied}/pipelines\n" in told
    assert f"\nworkers' pipelines is in {copied}/pipelines\n" in told


def test_the_other_script_starts_so_too(copied: Path, tmp_path: Path) -> None:
    told = start(copied / "pipelines" / "evaluate.py", STARTED, tmp_path)
    assert told.startswith("usage: evaluate.py")
    assert f"\npipelines is in {copied}/pipelines\n" in told
