"""`dreambooth keys` makes, lists and revokes keys, and tells of a mistake in one line."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from dreambooth.common.location import Location
from serve.api.auth import KeyRing
from serve.keys import main
from tests.conftest import ROOT


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    """Exit code, output and errors of a command."""
    try:
        code: object = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    output = capsys.readouterr()
    return code, output.out, output.err


def test_the_command_makes_lists_and_revokes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    store = ("--store", str(tmp_path))
    limits = ("--images-per-minute", "9", "--largest-side", "512")
    code, made, _ = run(capsys, "make", *store, "--tenant", "acme", "--subjects", "rex", "acme-*", *limits)
    key = asyncio.run(KeyRing(Location.of(tmp_path / "keys")).find(made.strip()))
    assert (code, key is not None) == (0, True)
    assert key is not None
    assert (key.tenant, key.subjects, key.admin) == ("acme", ("rex", "acme-*"), False)
    assert (key.images_per_minute, key.largest_side) == (9, 512)
    code, listed, _ = run(capsys, "list", *store)
    assert (code, key.id in listed, made.strip() in listed) == (0, True, False)
    assert run(capsys, "revoke", key.id, *store) == (0, "", "")
    code, _, error = run(capsys, "revoke", key.id, *store)
    assert (code, error.startswith("error: there is no key")) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "required: COMMAND"),
        (("list",), "required: --store"),
        (("list", "store=s"), "unknown argument store=s: write --store s"),
        (("list", "--store", "s", "--key", "k"), "unknown argument --key: the nearest valid one is --keys"),
        (("list", "--store", "s", "more"), "unknown argument more: `dreambooth keys list --help`"),
        (("make", "--store", "s", "--tenant", "t"), "a key without subjects can do nothing"),
        (("make", "--store", "s", "--tenant", "t", "--admin", "--largest-side", "0"), "--largest-side is 0"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], line: str
) -> None:
    code, output, error = run(capsys, *arguments)
    assert (code, output, len(error.splitlines())) == (2, "", 1)
    assert error.startswith("error: ")
    assert line in error


@pytest.mark.long
def test_the_module_runs_without_loading_torch_or_ray() -> None:
    program = "import sys, serve.keys; print(*{'torch', 'ray'} & set(sys.modules)); serve.keys.main(['--help'])"
    output = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert output.stdout.startswith("\nusage: dreambooth keys")
