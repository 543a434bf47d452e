"""The size and time of bodies are bounded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from dreambooth.common.location import Location
from dreambooth.store import SubjectStore
from serve.api import routes
from serve.api.image_files import ImageFiles
from serve.api.routes import ApiConfig, create_api
from serve.catalog.catalog import Catalog

pytestmark = pytest.mark.anyio
PATH = "/v1/images/generations"


@pytest.fixture
def application(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    """An API that has no models, and waits for bodies half a second."""
    monkeypatch.setattr(routes, "_BODY_SECONDS", 0.5)

    def draw(*_: Any) -> Any:
        pytest.fail("this reached a replica")

    return create_api(Catalog(SubjectStore(tmp_path)), draw, ApiConfig(None, ImageFiles(Location.of(tmp_path), 60)))


async def post(application: FastAPI, parts: Iterable[tuple[float, bytes]]) -> tuple[int, dict[str, Any]]:
    """Status and body of the answer to a body whose parts come each after so many seconds; a last part is empty."""
    coming, sent = iter(parts), []

    async def receive() -> dict[str, Any]:
        seconds, part = next(coming)
        await asyncio.sleep(seconds)
        return {"type": "http.request", "body": part, "more_body": part != b""}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http"},
        **{"path": PATH, "raw_path": PATH.encode(), "query_string": b"", "root_path": "", "state": {}},
        **{"headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 1), "server": ("x", 80)},
    }
    await application(scope, receive, send)  # type: ignore[arg-type]
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent))


async def test_a_body_that_comes_slowly_is_given_up(application: FastAPI) -> None:
    async with asyncio.timeout(5):
        status, answer = await post(application, ((0.2, b"[") for _ in range(10_000)))
    assert (status, answer["error"]["type"]) == (408, "invalid_request_error")


async def test_a_body_that_never_ends_is_given_up(application: FastAPI) -> None:
    received = 0

    def parts() -> Iterable[tuple[float, bytes]]:
        nonlocal received
        while True:
            received += 1000
            yield 0, b" " * 1000

    status, answer = await post(application, parts())
    assert (status, answer["error"]["type"]) == (413, "invalid_request_error")
    assert received < 70_000


async def test_a_body_in_parts_is_read(application: FastAPI) -> None:
    body = json.dumps({"model": "mug", "prompt": "a"}).encode()
    status, _ = await post(application, [(0.1, body[:10]), (0.1, body[10:]), (0, b"")])
    assert status == 404
