"""The API against its own OpenAPI document: whatever is sent, the answer is one that the document describes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import uvicorn

from dreambooth.common.location import Location
from dreambooth.store import SubjectStore
from serve.api.auth import KeyFolder
from serve.api.image_files import ImageFiles
from serve.api.routes import ApiConfig, create_api
from serve.catalog.catalog import Catalog
from serve.request import BadRequest, DrawnImage, GenerationRequest
from tests.conftest import ROOT
from tests.serve.published import publish_all


async def draw(backbone: str, request: GenerationRequest) -> AsyncIterator[DrawnImage]:
    """Images that are none, from all requests but those that a backbone cannot draw."""
    if request.width % 8 or request.height % 8:
        raise BadRequest("sides must be multiples of 8")
    for number in range(len(request.seeds)):
        for preview in range(request.previews):
            yield DrawnImage(number, b"preview", preview, 1)
        yield DrawnImage(number, b"png", None, 1)


@pytest.fixture(scope="module")
def secured(small_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The URL of the API with keys, and an admin's key."""
    store = SubjectStore(tmp_path_factory.mktemp("store"))
    [backbone] = {version.manifest["backbone"]["hash"] for version in publish_all(store, small_sdxl)}
    keys = KeyFolder(store.root / "keys")
    key, _ = keys.make("us", (), admin=True)
    files = ImageFiles(Location.of(tmp_path_factory.mktemp("images")), 60)
    api = create_api(Catalog(store, [backbone]), draw, ApiConfig(keys, files))
    server = uvicorn.Server(uvicorn.Config(api, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}", key
    server.should_exit = True
    thread.join()


def check(secured: tuple[str, str], folder: Path, examples: int) -> int:
    """Run schemathesis with all its checks; returns how many requests it made up."""
    (url, key), here = secured, Path(__file__).parent
    command = [
        *(str(Path(sys.executable).parent / "schemathesis"), "--config-file", str(here / "openapi.toml")),
        *("run", f"{url}/openapi.json", "-H", f"Authorization: Bearer {key}", "--max-examples", str(examples)),
        *("--checks", "all", "--seed", "1", "--continue-on-failure", "--no-color"),
    ]
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "tests.serve.api.openapi_hooks", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-2000:]
    match = re.search(r"(\d+) generated", run.stdout)
    assert match, run.stdout
    return int(match[1])


def test_answers_are_as_the_document_describes_them(secured: tuple[str, str], tmp_path: Path) -> None:
    assert check(secured, tmp_path, examples=20) > 200


@pytest.mark.slow
def test_thousands_of_answers_are_as_the_document_describes_them(secured: tuple[str, str], tmp_path: Path) -> None:
    assert check(secured, tmp_path, examples=2000) >= 5000
