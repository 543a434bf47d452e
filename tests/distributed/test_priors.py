"""Class-prior generation on a cluster of several nodes while processes are killed, and by two jobs at once."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster

from dreambooth.common.location import Location
from dreambooth.store import SubjectStore
from tests.conftest import ROOT
from tests.prior_sets import assert_whole, open_store, small_sets, undisturbed

COUNT, STEPS = 24, 40
SHARDS = 3 * COUNT // 4
TRIALS = 7
"""Of each kind, in the slow suite."""

Expected = dict[str, dict[str, bytes]]


@pytest.fixture(scope="module")
def expected(small_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """The shards that every run must end with, made without Ray."""
    store = open_store(tmp_path_factory.mktemp("undisturbed"), small_sdxl)
    return undisturbed(store, small_sets(small_sdxl, steps=STEPS), COUNT)


@pytest.fixture(scope="module")
def cluster(no_ray: None, bucket: Location, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head without cores for the drivers, and two nodes with a core each, which can reach the bucket."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # copies of remote backbones are kept there
        environment.setenv("PYTHONPATH", str(ROOT))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        yield cluster
        cluster.shutdown()


@pytest.fixture
def nodes(cluster: Cluster) -> Cluster:
    """The cluster with its two nodes alive, also after a test that killed one."""
    while len(cluster.worker_nodes) < 2:
        cluster.add_node(num_cpus=1)
    return cluster


def start(cluster: Cluster, store: SubjectStore, backbone: Path, samplers: int = 2) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.prior_sets", str(store.root), str(backbone), "--address", cluster.address]
    command += ["--count", str(COUNT), "--steps", str(STEPS), "--samplers", str(samplers)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


def processes_of(cluster: Cluster) -> list[psutil.Process]:
    """The samplers on the two nodes."""
    raylets = [node.all_processes["raylet"][0].process.pid for node in cluster.worker_nodes]
    children = [child for raylet in raylets for child in psutil.Process(raylet).children(recursive=True)]
    return [child for child in children if "ClassPriorSampler" in " ".join(named(child))]


def named(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def kill_a_sampler(cluster: Cluster, driver: subprocess.Popen[str], moment: random.Random) -> None:
    moment.choice(processes_of(cluster)).kill()
    finish(driver)


def kill_a_node(cluster: Cluster, driver: subprocess.Popen[str], moment: random.Random) -> None:
    node = moment.choice(sorted(cluster.worker_nodes, key=lambda node: node.unique_id))
    workers = psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True)
    cluster.remove_node(node, allow_graceful=False)
    for worker in workers:
        if worker.is_running():
            worker.kill()
    finish(driver)  # on the node that is left


def kill_the_driver(cluster: Cluster, driver: subprocess.Popen[str], moment: random.Random) -> None:
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()


Kill = Callable[[Cluster, subprocess.Popen[str], random.Random], None]
KILLS: list[Kill] = [kill_a_sampler, kill_a_node, kill_the_driver]


def trial(kill: Kill, seed: int, cluster: Cluster, folder: Path, backbone: Path, expected: Expected) -> None:
    """Kill at a random moment of the run; then what there is, and what the same command adds, is one whole set each."""
    moment = random.Random(f"{kill.__name__} {seed}")
    store = open_store(folder, backbone)
    made, pause = moment.randrange(SHARDS - 4), moment.uniform(0, 0.5)
    driver = start(cluster, store, backbone)
    while not (processes_of(cluster) and len(list(folder.glob("priors/*/*.parquet"))) >= made):
        assert driver.poll() is None, driver.communicate()[0]
        time.sleep(0.02)
    time.sleep(pause)
    assert driver.poll() is None, "the run ended before the kill"
    kill(cluster, driver, moment)
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("priors/*/*.parquet")}
    if kill is kill_the_driver:
        assert len(kept) < SHARDS
        finish(start(cluster, store, backbone))
        later = {path: path.stat().st_mtime_ns for path in folder.glob("priors/*/*.parquet")}
        assert kept.items() <= later.items(), "a shard was made twice"
    assert_whole(store, small_sets(backbone, steps=STEPS), COUNT, expected)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(TRIALS))
@pytest.mark.parametrize("kill", KILLS)
def test_sets_are_whole_after_any_kill(
    kill: Kill, seed: int, nodes: Cluster, tmp_path: Path, small_sdxl: Path, expected: Expected
) -> None:
    trial(kill, seed, nodes, tmp_path, small_sdxl, expected)


@pytest.mark.slow
def test_two_jobs_at_once_make_one_whole_set(
    place: Location, nodes: Cluster, small_sdxl: Path, expected: Expected
) -> None:
    store = open_store(place, small_sdxl)
    jobs = [start(nodes, store, small_sdxl, samplers=1) for _ in range(2)]
    for job in jobs:
        finish(job)
    assert_whole(store, small_sets(small_sdxl, steps=STEPS), COUNT, expected)
    for prior in small_sets(small_sdxl, steps=STEPS):
        assert (prior.location(store.root) / "preview.png").exists()
