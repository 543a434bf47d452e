"""Loss of whole nodes, with all that ran on them: several raylets, each with room for one training worker."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from dreambooth.runs import PlannedSubject, RunSpec
from dreambooth.store import SubjectStore
from pipelines.runtime.console import Display
from pipelines.stages.finetune import finetune
from pipelines.training.checkpoints import checkpoints, final_checkpoint
from pipelines.training.training_set import location_of
from tests.distributed.processes import processes
from tests.distributed.test_finetune import EVERY, STEPS, prepare, variants
from tests.distributed.tokens import without_tokens

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TRIALS = 3


@pytest.fixture(scope="module")
def cluster(no_ray: None) -> Iterator[Cluster]:
    """A head for the driver, without room for workers; two nodes with room for one each."""
    with without_tokens():
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        try:
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture
def nodes(cluster: Cluster) -> Iterator[list[Any]]:
    """The two nodes; a test may take some away and add others."""
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    yield nodes
    for node in nodes:
        cluster.remove_node(node)


@pytest.fixture(scope="module")
def prepared(
    cluster: Cluster, photos: Path, small_sdxl: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SubjectStore, PlannedSubject]:
    node = cluster.add_node(num_cpus=2)
    try:
        return prepare(photos, small_sdxl, tmp_path_factory.mktemp("lost"))
    finally:
        cluster.remove_node(node)


def train(store: SubjectStore, run: RunSpec, after: int, happen: Callable[[], None], **options: Any) -> None:
    """Train the run; let `happen` when a checkpoint of step `after` is there. Here: Ray's processes end with the thread
    that has started them."""
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(finetune, store, [run], EVERY, Display(), lanes=1, **options)
        while not any(found.step >= after for found in checkpoints(store, run)):
            assert not training.done(), training.result()
            time.sleep(0.01)
        happen()
        assert training.result() == {}


def weights(store: SubjectStore, run: RunSpec) -> dict[str, torch.Tensor]:
    final = final_checkpoint(store, run)
    assert final is not None
    return final.read()


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_lost_node_that_is_replaced_leaves_no_trace_in_the_weights(
    cluster: Cluster, nodes: list[Any], prepared: tuple[SubjectStore, PlannedSubject], zero_stage: int
) -> None:
    store, planned = prepared
    undisturbed, *disturbed = variants(store, planned.run, zero_stage, ["undisturbed", *map(str, range(TRIALS))])
    assert finetune(store, [undisturbed], EVERY, Display()) == {}
    expected = weights(store, undisturbed)
    chance = random.Random(zero_stage)
    for run in disturbed:

        def replace_one() -> None:
            cluster.remove_node(nodes.pop(chance.randrange(2)), allow_graceful=False)
            nodes.append(cluster.add_node(num_cpus=1))

        train(store, run, chance.randrange(EVERY, STEPS - EVERY, EVERY), replace_one)
        trained = weights(store, run)
        assert [name for name in expected if not torch.equal(trained[name], expected[name])] == []


def test_training_goes_on_with_the_node_that_is_left(
    cluster: Cluster, nodes: list[Any], prepared: tuple[SubjectStore, PlannedSubject]
) -> None:
    store, planned = prepared
    undisturbed, run = variants(store, planned.run, 2, ["undisturbed", "fewer"])
    assert finetune(store, [undisturbed], EVERY, Display()) == {}
    train(store, run, EVERY, lambda: cluster.remove_node(nodes.pop(0), allow_graceful=False), min_workers=1)
    assert len(nodes) == 1
    expected, trained = weights(store, undisturbed), weights(store, run)
    # Adam's steps have size lr whatever the gradient: rounding in near-zero gradients shows up to this size.
    assert max((trained[name] - expected[name]).abs().max().item() for name in expected) < STEPS * 1e-3
    assert any(not torch.equal(trained[name], expected[name]) for name in expected)


def test_training_takes_in_nodes_that_come(
    cluster: Cluster, nodes: list[Any], prepared: tuple[SubjectStore, PlannedSubject]
) -> None:
    store, planned = prepared
    training = replace(planned.run.training, steps=1000)  # Ray Train looks for new nodes once a minute
    run = replace(planned.run, training=training, sample_prompts=("more",))
    location_of(store, run).write_bytes(location_of(store, planned.run).read_bytes())
    cluster.remove_node(nodes.pop())
    seen: list[int] = []

    def add_one() -> None:
        seen.append(len(processes("RayTrainWorker")))
        nodes.append(cluster.add_node(num_cpus=1))
        while final_checkpoint(store, run) is None and seen[-1] < 2:
            seen.append(len(processes("RayTrainWorker")))
            time.sleep(0.1)

    train(store, run, EVERY, add_one, min_workers=1)
    assert (seen[0], seen[-1]) == (1, 2)
