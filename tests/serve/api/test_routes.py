"""The API by itself: what reaches the replicas, who is answered, and what a failure looks like."""

from __future__ import annotations

import asyncio
import logging
import random
import string
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from starlette.testclient import TestClient

from dreambooth.common.location import Location
from dreambooth.store import SubjectStore
from serve.api.auth import is_loopback
from serve.api.image_files import ImageFiles
from serve.api.routes import ApiConfig, create_api
from serve.catalog.catalog import Catalog
from serve.request import DrawnImage, GenerationRequest
from tests.serve.published import MUG, publish_all

GENERATIONS = "/v1/images/generations"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ApiConfig:
    """Without keys."""
    return ApiConfig(keys=None, files=ImageFiles(Location.of(tmp_path_factory.mktemp("images")), 60))


@pytest.fixture(scope="module")
def catalog(small_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    store = SubjectStore(tmp_path_factory.mktemp("store"))
    [backbone] = {version.manifest["backbone"]["hash"] for version in publish_all(store, small_sdxl)}
    return Catalog(store, [backbone])


async def no_draw(backbone: str, request: GenerationRequest) -> AsyncIterator[DrawnImage]:
    pytest.fail("this reached a replica")
    yield


def test_only_what_is_valid_reaches_a_replica(catalog: Catalog, config: ApiConfig) -> None:
    requests: list[GenerationRequest] = []

    async def draw(backbone: str, request: GenerationRequest) -> AsyncIterator[DrawnImage]:
        requests.append(request)
        for number in range(len(request.seeds)):
            yield DrawnImage(number, b"png", None, 1)

    client = TestClient(create_api(catalog, draw, config), client=("127.0.0.1", 1))
    for body in ({"model": "cat"}, {"model": "mug", "n": 0}, {"model": "mug", "prompt": "a {cat}"}):
        assert client.post(GENERATIONS, json={"prompt": "a {subject}", **body}).is_client_error
    assert requests == []
    assert client.post(
        GENERATIONS, json={"model": "mug", "prompt": "a {subject}", "n": 2, "seed": 2**32 - 1}
    ).is_success
    subject, version = MUG
    assert requests == [GenerationRequest(subject, version, "a sks mug", None, 32, 32, 3, 4.0, seeds=(2**32 - 1, 0))]


def test_a_failure_is_an_error_in_the_same_shape(catalog: Catalog, config: ApiConfig) -> None:
    async def draw(backbone: str, request: GenerationRequest) -> AsyncIterator[DrawnImage]:
        raise RuntimeError("a secret of the server")
        yield

    client = TestClient(create_api(catalog, draw, config), client=("127.0.0.1", 1), raise_server_exceptions=False)
    answer = client.post(GENERATIONS, json={"model": "mug", "prompt": "a {subject}"})
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text


@pytest.mark.parametrize(("host", "status"), [("127.0.0.1", 200), ("::1", 200), ("10.0.0.7", 403), ("fe80::1", 403)])
def test_clients_on_other_machines_are_refused(catalog: Catalog, config: ApiConfig, host: str, status: int) -> None:
    answer = TestClient(create_api(catalog, no_draw, config), client=(host, 1)).get("/v1/models")
    assert answer.status_code == status
    assert ("error" in answer.json()) == (status == 403)


def test_a_stream_whose_first_image_is_late_is_an_error_with_its_status(catalog: Catalog, config: ApiConfig) -> None:
    closed = asyncio.Event()

    async def draw(backbone: str, request: GenerationRequest) -> AsyncIterator[DrawnImage]:
        try:
            await asyncio.Event().wait()
            yield
        finally:
            closed.set()

    client = TestClient(create_api(catalog, draw, config), client=("127.0.0.1", 1))
    answer = client.post(GENERATIONS, json={"model": "mug", "prompt": "a {subject}", "stream": True, "deadline": 1})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert "not ready within 1 s" in answer.json()["error"]["message"]
    assert closed.is_set()


async def draw_anything(backbone: str, request: GenerationRequest) -> AsyncIterator[DrawnImage]:
    for number in reversed(range(len(request.seeds))):
        yield DrawnImage(number, f"png {number}".encode(), None, 1)


def test_images_can_be_fetched_by_url_until_their_time_is_over(catalog: Catalog, tmp_path: Path) -> None:
    now = 1_700_000_000.0
    folder = Location.of(tmp_path / "images")
    files = ImageFiles(folder, 60, lambda: now)
    client = TestClient(create_api(catalog, draw_anything, ApiConfig(None, files)), client=("127.0.0.1", 1))
    body = {"model": "mug", "prompt": "a {subject}", "n": 2, "response_format": "url"}
    images = client.post(GENERATIONS, json=body).json()["data"]
    assert all(image["url"].startswith("http://testserver/v1/images/files/") for image in images)
    assert [image["b64_json"] for image in images] == [None, None]
    answers = [client.get(image["url"]) for image in images]
    assert [(answer.status_code, answer.content) for answer in answers] == [(200, b"png 0"), (200, b"png 1")]
    assert answers[0].headers["content-type"] == "image/png"
    now += 61
    assert [client.get(image["url"]).status_code for image in images] == [404, 404]
    assert (files.clear(), folder.names()) == (2, [])


def test_images_are_cleared_while_the_server_runs(catalog: Catalog, tmp_path: Path) -> None:
    folder = Location.of(tmp_path / "images")
    files = ImageFiles(folder, 0.3)
    with TestClient(create_api(catalog, draw_anything, ApiConfig(None, files)), client=("127.0.0.1", 1)):
        files.add(b"png")
        end = time.monotonic() + 10
        while folder.names() and time.monotonic() < end:
            time.sleep(0.05)
    assert folder.names() == []


def test_urls_begin_with_the_public_one(catalog: Catalog, config: ApiConfig) -> None:
    public = replace(config, public_url="https://example.org/images/")
    client = TestClient(create_api(catalog, draw_anything, public), client=("127.0.0.1", 1))
    body = {"model": "mug", "prompt": "a {subject}", "response_format": "url"}
    [image] = client.post(GENERATIONS, json=body).json()["data"]
    assert image["url"].startswith("https://example.org/images/v1/images/files/")
    answer = client.post(GENERATIONS, json={**body, "stream": True})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "response_format")


@pytest.mark.parametrize("name", ["cat", "%2e%2e%2fkeys", "1700000000-" + "a" * 43 + ".png"])
def test_images_that_are_not_there_are_not_found(catalog: Catalog, config: ApiConfig, name: str) -> None:
    client = TestClient(create_api(catalog, no_draw, config), client=("127.0.0.1", 1))
    answer = client.get(f"/v1/images/files/{name}")
    assert (answer.status_code, "error" in answer.json()) == (404, True)


def test_a_version_that_cannot_be_served_is_refused_with_the_reason(
    small_sdxl: Path, tmp_path: Path, config: ApiConfig
) -> None:
    store = SubjectStore(tmp_path)
    [old, *_] = publish_all(store, small_sdxl)
    manifest = {**old.manifest, "subject": "cup", "components": ["lora"]}
    (store.version_location("cup", old.id) / "manifest.json").write_json(manifest)
    client = TestClient(create_api(Catalog(store), no_draw, config), client=("127.0.0.1", 1))
    for model in ("cup", f"cup@{old.id}"):
        answer = client.post(GENERATIONS, json={"model": model, "prompt": "a {subject}"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "model_not_served")
        assert "lora" in answer.json()["error"]["message"]
    assert "lora" in client.get("/v1/models/cup").json()["unserved"]


def test_a_store_that_cannot_be_read_is_a_503(catalog: Catalog, config: ApiConfig, tmp_path: Path) -> None:
    async def draw(backbone: str, request: GenerationRequest) -> AsyncIterator[DrawnImage]:
        raise OSError("connection refused by a secret host")
        yield

    client = TestClient(create_api(catalog, draw, config), client=("127.0.0.1", 1))
    answer = client.post(GENERATIONS, json={"model": "mug", "prompt": "a {subject}"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
    assert int(answer.headers["Retry-After"]) > 0
    assert "secret" not in answer.text


@pytest.mark.slow
def test_ten_thousand_unknown_ids_reach_no_replica_and_leave_no_trace(
    catalog: Catalog, config: ApiConfig, caplog: pytest.LogCaptureFixture
) -> None:
    client = TestClient(create_api(catalog, no_draw, config), client=("127.0.0.1", 1))
    chance = random.Random(1)

    def ask(count: int) -> None:
        for _ in range(count):
            model = "".join(chance.choices(string.printable, k=chance.randrange(1, 200)))
            answer = client.post(GENERATIONS, json={"model": model, "prompt": "a {subject}"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")

    caplog.set_level(logging.CRITICAL, "ray.serve")  # pytest keeps all that is logged
    ask(1000)
    before = psutil.Process().memory_info().rss
    ask(10_000)
    assert psutil.Process().memory_info().rss - before < 8 * 2**20


def test_loopback_hosts() -> None:
    hosts = ["127.0.0.1", "localhost", "::1", "0.0.0.0", "::", "192.168.0.2", "example.org"]
    assert [host for host in hosts if is_loopback(host)] == ["127.0.0.1", "localhost", "::1"]
