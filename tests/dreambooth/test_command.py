"""The console command, as an installation registers it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import EntryPoint, distributions
from pathlib import Path

import pytest

from dreambooth.command import main
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the metadata that an installation of this project has."""
    folder = tmp_path_factory.mktemp("installed")
    build = "import sys; from setuptools import build_meta; build_meta.prepare_metadata_for_build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, folder], cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture
def installed(metadata: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, before any other on the path; names of the program are put back."""
    monkeypatch.syspath_prepend(metadata)
    monkeypatch.setattr("sys.argv", ["dreambooth"])
    return metadata


def test_an_installation_has_the_command_and_all_its_parts(installed: Path) -> None:
    points: set[EntryPoint] = set()
    for found in distributions(path=[str(installed)], name="dreambooth"):
        points |= set(found.entry_points)
    values = {(point.group, point.name): point.value for point in points}
    assert values.pop(("console_scripts", "dreambooth")) == "dreambooth.command:main"
    assert values.keys() == {("dreambooth.commands", name) for name in ("personalize", "evaluate", "serve", "keys")}
    assert all(callable(point.load()) for point in points)


def test_help_lists_the_commands_and_imports_none_of_them(metadata: Path) -> None:
    path = os.pathsep.join([str(metadata), str(ROOT)])
    listed = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "dreambooth", "--help"],
        cwd=metadata,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    for name, line in {
        "personalize": "Personalize a text-to-image model: 3-5 photos of a subject in, a published model out.\n",
        "evaluate": "Score published versions by the paper's protocol (Ruiz et al., CVPR 2023, section 4).\n",
        "serve": "",
        "keys": "Make, list and revoke the keys of a server",
    }.items():
        assert f"\n  {name:14}{line}" in listed.stdout
    imported = {line.rpartition("|")[2].strip() for line in listed.stderr.splitlines()}
    assert "importlib.metadata" in imported
    assert not imported & {"torch", "ray", "tyro", "numpy", "pipelines.planning", "serve.keys"}


def test_without_a_command_there_is_help(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    alone = capsys.readouterr().out
    assert main(["-h"]) == 0
    assert capsys.readouterr().out == alone
    assert alone.startswith("usage: dreambooth COMMAND [OPTIONS]\n")


def test_an_unknown_command_is_an_error_that_names_the_nearest(
    installed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["persnalise", "--steps", "3"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == (
        "error: unknown command 'persnalise': did you mean 'personalize'? `dreambooth --help` lists the commands\n"
    )


@pytest.mark.parametrize("name", ["personalize", "evaluate"])
def test_a_command_has_the_options_of_its_script_under_its_own_name(
    installed: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines import evaluate, personalize

    script = {"personalize": personalize, "evaluate": evaluate}[name]
    texts = []
    for program, arguments in ((main, [name, "--help-all"]), (script.main, ["--help-all"])):
        monkeypatch.setattr("sys.argv", [f"pipelines/{name}.py"])
        with pytest.raises(SystemExit) as exit_:
            program(arguments)
        assert exit_.value.code == 0
        texts.append(capsys.readouterr().out.splitlines())
    assert [lines[0] for lines in texts] == [f"usage: dreambooth {name} [OPTIONS]", f"usage: {name}.py [OPTIONS]"]
    assert texts[0][1:] == texts[1][1:]
    assert len(texts[0]) > 30


def test_a_command_hands_its_exit_code_on(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--class-images", "-1"]) == 2
    assert capsys.readouterr().err == "error: --class-images must not be below 0, not -1\n"
    with pytest.raises(SystemExit) as exit_:
        main(["evaluate", "--class-image", "1"])
    assert exit_.value.code == 2
    told = capsys.readouterr().err
    assert "--class-images" in told
    assert "dreambooth evaluate --help" in told


def test_without_an_installation_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [])
    assert main(["--help"]) == 2
    assert "install the project" in capsys.readouterr().err
