"""What fails while clients ask: replicas, nodes, the store, deployments. No image is wrong; nobody is left behind."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster

from dreambooth.common.location import Location
from dreambooth.store import SubjectStore
from tests.distributed.tokens import without_tokens
from tests.distributed.traffic import Subjects, Traffic, deploy, publish_subjects, serving, zipf

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TRIALS = 10
COUNT = 12


@pytest.fixture(scope="module")
def subjects(small_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Subjects:
    return publish_subjects(SubjectStore(tmp_path_factory.mktemp("serving")), small_sdxl, COUNT)


@pytest.fixture
def own_ray(no_ray: None) -> Iterator[None]:
    ray.init(num_cpus=4, log_to_driver=False, logging_level="ERROR")
    yield
    serve.shutdown()
    ray.shutdown()


def replicas() -> list[str]:
    names = [entry["name"] for entry in ray.util.list_named_actors(all_namespaces=True)]
    return sorted(name for name in names if name.startswith("SERVE_REPLICA::default#subjects-"))


def wait_for_replicas(count: int) -> None:
    end = time.monotonic() + 120
    while len(replicas()) < count:
        assert time.monotonic() < end, replicas()
        time.sleep(0.2)


def test_a_killed_replica_fails_no_request(subjects: Subjects, own_ray: None) -> None:
    with (
        serving(subjects, replicas=3, host_memory=subjects.room(4)) as url,
        Traffic(url, subjects.images, zipf(COUNT), clients=6) as traffic,
    ):
        for trial in range(TRIALS):
            traffic.wait_for(10)
            wait_for_replicas(3)
            ray.kill(ray.get_actor(replicas()[trial % 3], namespace="serve"), no_restart=True)
        traffic.wait_for(20)
    assert (traffic.wrong, traffic.others) == ([], [])


def test_deploying_again_fails_no_request(subjects: Subjects, own_ray: None) -> None:
    room = subjects.room(12)
    with (
        serving(subjects, replicas=2, host_memory=room) as url,
        Traffic(url, subjects.images, zipf(COUNT), clients=4) as traffic,
    ):
        for trial in range(TRIALS):
            deploy(subjects, replicas=2, host_memory=room * (2 + trial))
            traffic.wait_for(5)
    assert (traffic.wrong, traffic.others) == ([], [])


@pytest.fixture
def cluster(no_ray: None) -> Iterator[Cluster]:
    """A head with room for one replica; a test adds nodes."""
    with without_tokens():
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            yield cluster
        finally:
            serve.shutdown()
            ray.shutdown()
            cluster.shutdown()


def test_a_killed_node_fails_no_client_that_asks_again(subjects: Subjects, cluster: Cluster) -> None:
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    with (
        serving(subjects, replicas=3, ingresses=2, host_memory=subjects.room(6)) as url,
        Traffic(url, subjects.images, zipf(COUNT), clients=4, patient=True) as traffic,
    ):
        for trial in range(TRIALS):
            traffic.wait_for(10)
            cluster.remove_node(nodes.pop(trial % 2), allow_graceful=False)
            traffic.wait_for(10)
            nodes.append(cluster.add_node(num_cpus=1))
        traffic.wait_for(20)
    assert (traffic.wrong, traffic.others) == ([], [])
    assert max(answer.seconds for answer in traffic.answers) < 120


class Gate:
    """A local port that passes on to another until it is shut: then connections break, and new ones do at once."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target, self._is_open, self._passing = target, True, set[socket.socket]()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def shut(self) -> None:
        self._is_open = False
        for end in list(self._passing):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def open(self) -> None:
        self._is_open = True

    def _accept(self) -> None:
        while True:
            client, _ = self._server.accept()
            if not self._is_open:
                client.close()
                continue
            server = socket.create_connection(self._target)
            for one, other in ((client, server), (server, client)):
                self._passing.add(one)
                threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        self._passing.discard(source)


def test_a_store_that_is_away_delays_requests_and_fails_none(
    bucket: Location, small_sdxl: Path, tmp_path: Path, own_ray: None
) -> None:
    address = bucket.uri.split("endpoint_override=")[1].split("&")[0]
    host, port = address.split(":")
    gate = Gate((host, int(port)))
    location = Location.of(bucket.uri.replace(address, f"127.0.0.1:{gate.port}")) / "outage"
    subjects = publish_subjects(SubjectStore(location), small_sdxl, COUNT)
    arguments = {"replicas": 2, "host_memory": subjects.room(2), "disk_space": subjects.room(6)}
    longest = float(os.environ.get("OUTAGE_SECONDS", "30"))
    with serving(subjects, disk=str(tmp_path / "disk"), **arguments) as url:
        with Traffic(url, subjects.images, [1.0] * COUNT, clients=4) as traffic:
            for trial in range(TRIALS):
                traffic.wait_for(10)
                gate.shut()
                time.sleep(longest if trial == TRIALS - 1 else 3)
                gate.open()
            traffic.wait_for(20)
        assert (traffic.wrong, traffic.others) == ([], [])
        assert max(answer.seconds for answer in traffic.answers) < longest + 30
