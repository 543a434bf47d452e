"""The main job on a cluster that asks for Ray's token, as `ray job submit` runs it."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dreambooth.store import SubjectStore
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("no_ray")

RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """A head node of its own with token authentication on; gives the environment of a client that has the token."""
    port = free_port()
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    del environment["RAY_ADDRESS"]
    # As in an image: `python` is the one that has the packages.
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    # In a folder of its own: `ray start` notes its address there, and misleads later runs when it is gone. A short one,
    # since Ray's sockets lie in it.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    command = [*RAY, "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats", f"--temp-dir={folder}"]
    head = subprocess.Popen(
        [*command, f"--port={free_port()}", f"--dashboard-port={port}", "--dashboard-agent-listen-port=0"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    environment["RAY_ADDRESS"] = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 90
    while ray_job(environment, "submit", "--", "true").returncode != 0:
        assert time.monotonic() < deadline, "the cluster took no job"
        time.sleep(1)
    yield environment
    # At once: on SIGTERM the head waits half a minute for its parts.
    for process in (*psutil.Process(head.pid).children(recursive=True), head):
        process.kill()
    head.wait(timeout=60)
    shutil.rmtree(folder, ignore_errors=True)


def ray_job(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*RAY, "job", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)


def test_a_submitted_job_succeeds_and_its_log_is_calm(cluster: dict[str, str], tmp_path: Path) -> None:
    entrypoint = (
        f"python pipelines/personalize.py --store {tmp_path} --steps 10 --prior-images 8 --prior-steps 4 "
        "--sample-prompts {subject} --sample-steps 4"
    )
    job = ["--submission-id", "sample-subject", "--working-dir", "."]
    submitted = ray_job(cluster, "submit", *job, "--", *entrypoint.split())
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr

    log = ray_job(cluster, "logs", "sample-subject").stdout
    for line in (
        "class priors",
        "encode",
        "fine-tune      10/10 steps",
        "loss: instance",
        "sample",
        "1 published, 0 failed",
    ):
        assert line in log
    assert len(log.splitlines()) < 40
    assert not re.search(r"\b(INFO|WARNING|Traceback)\b|\x1b\[", log.partition("class priors")[2])

    [version] = SubjectStore(tmp_path).versions("sample-dog")
    assert version.manifest["class_noun"] == "dog"


def test_a_client_without_the_token_is_turned_away(cluster: dict[str, str]) -> None:
    stranger = {**cluster, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    refused = ray_job(stranger, "submit", "--", "true")
    assert refused.returncode != 0
    assert re.search("401|403|[Uu]nauth|token", refused.stdout + refused.stderr)
