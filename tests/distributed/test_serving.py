"""Many subjects under load: every image is its subject's own, few loads suffice, and memory stays flat."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray import serve

from dreambooth.store import SubjectStore
from tests.distributed.processes import processes
from tests.distributed.traffic import Subjects, Traffic, count_reads, publish_subjects, serving, zipf

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

REPLICA, INGRESS = "ServeReplica:default:subjects", "ServeReplica:default:Ingress"


@pytest.fixture(scope="module", autouse=True)
def own_ray(no_ray: None) -> Iterator[None]:
    ray.init(num_cpus=4, log_to_driver=False, logging_level="ERROR")
    yield
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def subjects(small_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Subjects:
    return publish_subjects(SubjectStore(tmp_path_factory.mktemp("serving")), small_sdxl, 200)


def some(subjects: Subjects, count: int) -> Subjects:
    return Subjects(subjects.store, dict(list(subjects.images.items())[:count]), subjects.size)


def metrics_url() -> str:
    [node] = ray.nodes()
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def rss(name: str) -> float:
    """MiB of the largest of these processes."""
    return max(process.memory_info().rss for process in processes(name)) / 2**20


def test_images_are_their_subjects_own_and_few_loads_suffice(subjects: Subjects) -> None:
    few = some(subjects, 12)
    with (
        serving(few, replicas=3, host_memory=few.room(4)) as url,
        Traffic(url, few.images, zipf(12), clients=16, requests=120) as traffic,
    ):
        pass
    assert (traffic.right, traffic.wrong, traffic.others) == (120, [], [])
    counts = count_reads(metrics_url())
    assert counts["store"] <= 15, counts  # 12 are needed


def test_a_hot_subject_is_drawn_by_more_replicas_than_its_home(subjects: Subjects) -> None:
    hot = some(subjects, 1)
    before = count_reads(metrics_url())
    with (
        # Its queue never grows by the four times five requests that let one leave which is not hot.
        serving(hot, replicas=3, host_memory=hot.room(4), escape=5) as url,
        Traffic(url, hot.images, [1.0], clients=16, requests=160) as traffic,
    ):
        pass
    assert (traffic.right, traffic.wrong, traffic.others) == (160, [], [])
    assert count_reads(metrics_url())["store"] - before["store"] >= 2


def test_two_hundred_subjects_behind_one_endpoint_with_flat_memory(subjects: Subjects) -> None:
    before = count_reads(metrics_url())
    with serving(subjects, replicas=3, host_memory=subjects.room(20)) as url:
        sizes = []
        for _ in range(5):
            with Traffic(url, subjects.images, zipf(200), clients=6, requests=200) as traffic:
                pass
            assert (traffic.right, traffic.wrong, traffic.others) == (200, [], [])
            sizes.append((rss(REPLICA), rss(INGRESS)))
    loads = count_reads(metrics_url())["store"] - before["store"]
    assert loads > 200  # most subjects were dropped and read again
    (replica, ingress), (last_replica, last_ingress) = sizes[1], sizes[-1]
    print("MiB of the largest replica and of the ingress, every 200 requests:", sizes, "loads:", loads)
    assert last_replica - replica < 40, sizes
    assert last_ingress - ingress < 10, sizes
