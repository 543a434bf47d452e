"""Replicas come with the requests, and go when there are none."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ray import serve

from dreambooth.store import SubjectStore
from tests.distributed.processes import processes
from tests.distributed.traffic import Traffic, draw, publish_subjects, serving, zipf

pytestmark = pytest.mark.slow

REPLICA = "ServeReplica:default:subjects"


@pytest.fixture
def own_ray(no_ray: None) -> Iterator[None]:
    ray.init(num_cpus=4, log_to_driver=False, logging_level="ERROR")
    yield
    serve.shutdown()
    ray.shutdown()


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.2)


def test_replicas_follow_the_load_from_none_and_back(small_sdxl: Path, tmp_path: Path, own_ray: None) -> None:
    subjects = publish_subjects(SubjectStore(tmp_path), small_sdxl, 4)
    with serving(subjects, replicas=0, max_replicas=2, ongoing_per_replica=1, idle=3) as url:
        wait_until(lambda: not processes(REPLICA), 60)
        for _ in range(2):
            answer = draw(url, "subject0", subjects.images["subject0"])  # waits for the first replica
            assert (answer.status, answer.right) == (200, True), answer
            wait_until(lambda: not processes(REPLICA), 120)
        with Traffic(url, subjects.images, zipf(4), clients=6) as traffic:
            wait_until(lambda: len(processes(REPLICA)) == 2, 180)
            traffic.wait_for(20)
        assert (traffic.wrong, traffic.others) == ([], [])
        wait_until(lambda: not processes(REPLICA), 120)
