"""Rows of work on a pool of Ray Data actors, each on the resources of a training worker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.data import ActorPoolStrategy

from dreambooth.runs import WorkerGroup

_DEATHS = 20
"""How often an actor's process or node may die: what dies at every start must end the run, not keep it for ever."""


def pool_size(lane: WorkerGroup, rows: int, wanted: int | None = None) -> int:
    """Actors at work, no more than a row each: those wanted, or all that the cluster has room for.

    Without a wish they are no fewer than the lane has workers, for which more nodes may come.
    """
    if wanted is not None:
        return min(rows, wanted)
    have = ray.cluster_resources()
    each = {"CPU": lane.cpus_per_worker, "GPU": lane.gpus_per_worker}
    room = min(int(have.get(name, 0) / amount) for name, amount in each.items() if amount)
    return min(rows, max(room, lane.workers))


def map_on_actors(
    name: str,
    rows: Sequence[dict[str, Any]],
    actor: type,
    arguments: tuple[Any, ...],
    lane: WorkerGroup,
    size: int,
    calls: int = 1,
) -> Iterator[dict[str, Any]]:
    """What fresh actors of the class `actor` make of each row, as it comes; a row whose actor dies is given to another.

    `calls` rows are in an actor's hands at a time, in threads.
    """
    dataset = ray.data.from_items(list(rows), override_num_blocks=len(rows)).map(
        actor,
        fn_constructor_args=arguments,
        compute=ActorPoolStrategy(
            size=size,
            max_concurrent_calls_per_actor=calls,
            max_tasks_in_flight_per_actor=calls,
            enable_true_multi_threading=calls > 1,
        ),
        num_cpus=lane.cpus_per_worker,
        num_gpus=lane.gpus_per_worker or None,
        max_restarts=_DEATHS,
        max_task_retries=-1,  # each attempt to reach a node that is gone counts as one
    )
    dataset.set_name(name)
    yield from dataset.iter_rows()
