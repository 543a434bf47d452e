"""The tutorial as a reader goes through it, in a shell: photos, a version, keys, a server, images, scores."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.docs.pages import Block, page

SHORT = {
    "dreambooth personalize": "--steps 2 --prior-images 8 --prior-steps 2 --sample-steps 2",
    "dreambooth evaluate": "--images-a-prompt 1 --class-images 2",
}
"""What makes a command short: fewer steps and images."""


def block(first: str, number: int = 0) -> Block:
    """The tutorial's block that begins with these words."""
    found = [one for one in page("docs/tutorial.md").blocks if one.text.startswith(first)]
    return found[number]


@pytest.mark.slow
def test_the_tutorial_ends_with_images_and_scores(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": binaries, "PYTHONPATH": str(ROOT)}

    def shell(script: str) -> str:
        for command, options in SHORT.items():
            script = script.replace(command, f"{command} {options}")
        done = subprocess.run(
            ["bash", "-ec", script.replace("8000", port)],
            **{"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 900},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    [personalize, keys, serve] = block("dreambooth personalize", -1).text.strip().splitlines()
    shown = shell(f"{personalize}\n{keys}")
    [version] = (tmp_path / "dreambooth-store/subjects/rex/versions").iterdir()
    assert f"rex@{version.name} is published" in shown
    assert (version / "contact_sheet.png").is_file()

    server = subprocess.Popen(["bash", "-ec", f"exec {serve.replace('8000', port)}"], cwd=tmp_path, env=environment)
    try:
        wait_for(port, server)
        asked = shell(block("curl").text)
    finally:
        server.terminate()
        server.wait(60)
    models, images = (json.loads(answer) for answer in split(asked))
    assert [model["id"] for model in models["data"]] == ["rex", f"rex@{version.name}"]
    assert images["warning"] is None
    assert images["data"][0]["url"].startswith(f"http://127.0.0.1:{port}/")
    [picture] = (tmp_path / "dreambooth-store/images").iterdir()
    assert picture.read_bytes().startswith(b"\x89PNG")

    table = shell(block("dreambooth evaluate").text)
    assert [line.split()[0] for line in table.splitlines() if line.startswith("rex")] == ["rex", f"rex@{version.name}"]


def wait_for(port: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until the server answers, if only that a key is needed."""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        assert server.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/openapi.json", timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    pytest.fail("the server does not answer")


def split(text: str) -> list[str]:
    """JSON objects that follow each other."""
    found, decoder = [], json.JSONDecoder()
    while text.strip():
        text = text.strip()
        _, end = decoder.raw_decode(text)
        found.append(text[:end])
        text = text[end:]
    return found
