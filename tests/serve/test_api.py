"""The API by itself: what reaches the replicas, who is answered, and what a failure looks like."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from dreambooth.store import SubjectStore
from serve.api import Rules, create_api, is_loopback
from serve.catalog import Catalog
from serve.order import Drawn, Order
from tests.serve.published import MUG, publish_all

GENERATIONS = "/v1/images/generations"
OPEN = Rules(keys=None)


@pytest.fixture(scope="module")
def catalog(small_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    store = SubjectStore(tmp_path_factory.mktemp("store"))
    [backbone] = {version.manifest["backbone"]["hash"] for version in publish_all(store, small_sdxl)}
    return Catalog(store, [backbone])


async def no_draw(backbone: str, order: Order) -> AsyncIterator[Drawn]:
    pytest.fail("this reached a replica")
    yield


def test_only_what_is_valid_reaches_a_replica(catalog: Catalog) -> None:
    orders: list[Order] = []

    async def draw(backbone: str, order: Order) -> AsyncIterator[Drawn]:
        orders.append(order)
        for number in range(len(order.seeds)):
            yield Drawn(number, b"png", None, 1)

    client = TestClient(create_api(catalog, draw, OPEN), client=("127.0.0.1", 1))
    for body in ({"model": "cat"}, {"model": "mug", "n": 0}, {"model": "mug", "prompt": "a {cat}"}):
        assert client.post(GENERATIONS, json={"prompt": "a {subject}", **body}).is_client_error
    assert orders == []
    assert client.post(
        GENERATIONS, json={"model": "mug", "prompt": "a {subject}", "n": 2, "seed": 2**32 - 1}
    ).is_success
    subject, version = MUG
    assert orders == [Order(subject, version, "a sks mug", None, 32, 32, 3, 4.0, seeds=(2**32 - 1, 0))]


def test_a_failure_is_an_error_in_the_same_shape(catalog: Catalog) -> None:
    async def draw(backbone: str, order: Order) -> AsyncIterator[Drawn]:
        raise RuntimeError("a secret of the server")
        yield

    client = TestClient(create_api(catalog, draw, OPEN), client=("127.0.0.1", 1), raise_server_exceptions=False)
    answer = client.post(GENERATIONS, json={"model": "mug", "prompt": "a {subject}"})
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text


@pytest.mark.parametrize(("host", "status"), [("127.0.0.1", 200), ("::1", 200), ("10.0.0.7", 403), ("fe80::1", 403)])
def test_clients_on_other_machines_are_refused(catalog: Catalog, host: str, status: int) -> None:
    answer = TestClient(create_api(catalog, no_draw, OPEN), client=(host, 1)).get("/v1/models")
    assert answer.status_code == status
    assert ("error" in answer.json()) == (status == 403)


def test_loopback_hosts() -> None:
    hosts = ["127.0.0.1", "localhost", "::1", "0.0.0.0", "::", "192.168.0.2", "example.org"]
    assert [host for host in hosts if is_loopback(host)] == ["127.0.0.1", "localhost", "::1"]
