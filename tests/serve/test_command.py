"""`dreambooth serve`: every mistake is told in one line before Ray starts; what starts answers, and stops cleanly."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import ray

from dreambooth.store import SubjectStore, Version
from serve.api.auth import KeyFolder
from serve.command import main
from serve.config import ServeConfig
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("no_ray")


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that exits with 2, without Ray."""
    try:
        code: object = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    output = capsys.readouterr()
    assert (code, output.out, ray.is_initialized()) == (2, "", False)
    [line] = output.err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "--store is missing"),
        (("--store", "s", "--replica", "2"), "unknown argument --replica: the nearest valid one is --replicas"),
        (("store=s",), "unknown argument store=s: write --store s"),
        (("--store", "s", "more"), "unknown argument more"),
        (("--store", "s", "--replicas", "two"), "--replicas is 'two'"),
        (("--store", "s", "--replicas", "0"), "give max_replicas too"),
        (("--store", "s", "--precision", "fp16"), "--precision is 'fp16': input should be 'fp32' or 'bf16'"),
        (("--store", "s", "--port", "70000"), "--port is 70000"),
        (("--store", "s", "--without-keys", "--host", "0.0.0.0"), "listen on 0.0.0.0"),
        (("--store", "there-is-none"), "there is no store"),
    ],
)
def test_a_wrong_argument_is_named(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], line: str) -> None:
    assert line in refusal(capsys, *arguments, *(["--port", str(free_port())] if "--port" not in arguments else []))


def test_a_store_without_keys_or_versions_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ("--store", str(tmp_path), "--port", str(free_port()))
    assert "make one with `dreambooth keys make`" in refusal(capsys, *arguments)
    assert "holds no published version" in refusal(capsys, *arguments, "--without-keys")
    assert "cannot read the store" in refusal(capsys, "--store", "s3://", "--port", str(free_port()))


def test_an_unknown_model_to_keep_is_refused(
    capsys: pytest.CaptureFixture[str], store: SubjectStore, versions: list[Version]
) -> None:
    arguments = ("--store", store.root.uri, "--without-keys", "--port", str(free_port()), "--keep", "mug,cat")
    assert "keep names cat" in refusal(capsys, *arguments)


def test_a_taken_port_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refusal(capsys, "--store", str(tmp_path), "--port", str(port))
        assert line.startswith(f"error: port {port} on 127.0.0.1 is taken")
        assert line.endswith("give another with --port")


def test_help_shows_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: dreambooth serve --store STORE")
    assert all(f"--{name.replace('_', '-')}" in text for name in ServeConfig.model_fields)
    assert "None" not in text


@pytest.mark.long
def test_it_serves_until_it_is_told_to_stop(store: SubjectStore, versions: list[Version]) -> None:
    secret, _ = KeyFolder(store.root / "keys").make("us", (), admin=True)
    port = free_port()
    command = [sys.executable, "-m", "serve.command", "--store", store.root.uri, "--port", str(port), "--keep", "mug"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as server:
        assert server.stdout is not None
        lines = []
        for line in server.stdout:
            lines.append(line)
            if line.startswith("Ctrl-C"):
                break
        assert f"serving 2 subjects in 3 versions at http://127.0.0.1:{port}\n" in lines
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/models", headers={"Authorization": f"Bearer {secret}"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            assert len(json.load(response)["data"]) == 5
        server.send_signal(signal.SIGTERM)
        output, errors = server.communicate(timeout=120)
    assert (server.returncode, output, errors) == (0, "stopped\n", "")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
