"""Rows of work on a pool of Ray Data actors, each on the resources of a training worker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.data import ActorPoolStrategy
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dreambooth.runs import Resources
from pipelines.runtime.starts import Starts

_DEATHS = 20
"""How often the actors of a pool may die, for each of them: what dies at every start must end the run."""


def pool_size(resources: Resources, rows: int, wanted: int | None = None) -> int:
    """Actors at work, no more than a row each: those wanted, or all that the cluster has room for.

    Without a wish they are no fewer than `resources.workers`, for which more nodes may come.
    """
    if wanted is not None:
        return min(rows, wanted)
    have = ray.cluster_resources()
    each = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    room = min(int(have.get(name, 0) / amount) for name, amount in each.items() if amount)
    return min(rows, max(room, resources.workers))


def map_on_actors(
    name: str,
    rows: Sequence[dict[str, Any]],
    actor: type,
    arguments: tuple[Any, ...],
    resources: Resources,
    size: int,
    calls: int = 1,
) -> Iterator[dict[str, Any]]:
    """What fresh actors of the class `actor` make of each row, as it comes; a row whose actor dies is given to another.

    `calls` rows are in an actor's hands at a time, in threads.
    """
    # Ray Data restarts for ever what has died. The count lives with the driver: a lost node must not take it along.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    starts = ray.remote(Starts).options(num_cpus=0, scheduling_strategy=here).remote(size * (1 + _DEATHS))
    dataset = ray.data.from_items(list(rows), override_num_blocks=len(rows)).map(
        _with_bounded_starts(actor, starts),
        fn_constructor_args=arguments,
        compute=ActorPoolStrategy(
            size=size,
            max_concurrent_calls_per_actor=calls,
            max_tasks_in_flight_per_actor=calls,
            enable_true_multi_threading=calls > 1,
        ),
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker or None,
    )
    dataset.set_name(name)
    yield from dataset.iter_rows()


def _with_bounded_starts(actor: type, starts: Any) -> type:
    """The class `actor`, of which no more are started than `starts` allows."""

    def begin(self: Any, *arguments: Any) -> None:
        if not ray.get(starts.one_more.remote()):
            raise RuntimeError(f"{actor.__name__}: its processes or nodes died too often; see their logs")
        actor.__init__(self, *arguments)  # type: ignore[misc]

    return type(actor.__name__, (actor,), {"__init__": begin})
