"""Which replica draws an order: a subject stays where it is loaded, until the queue there is too long."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Collection, Mapping
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from serve.request import GenerationRequest

_MOST_SUBJECTS = 100_000
_RECENT = 256
"""Orders by which the demand for subjects is known."""
_FEWEST = 64
"""Orders below which a part of them says little."""
_COLD = 4.0
"""How much longer than for a hot subject the queue at home must be before another may leave."""


class SubjectPlacement:
    """The replica that each subject lives on.

    By rendezvous hashing, so that a replica's coming or going moves few subjects, but no replica gets more than its
    share, so that subjects which fit the replicas' memories together fit each of them. Homes are remembered here, so
    the routers of two ingress processes may disagree on those that hashing alone would have put elsewhere.
    """

    def __init__(self) -> None:
        """Nobody lives anywhere."""
        self._homes: OrderedDict[str, str] = OrderedDict()
        self._counts: Counter[str] = Counter()

    def ranked(self, model: str, replicas: Collection[str]) -> list[str]:
        """The replicas in the order in which the subject prefers them: its home is the first."""
        order = sorted(replicas, key=lambda replica: hashlib.sha256(f"{replica}/{model}".encode()).digest())
        home = self._homes.get(model)
        if home not in order:
            self._move_out(replicas)
            share = math.ceil((len(self._homes) + 1) / len(order))
            home = next(replica for replica in order if self._counts[replica] < share)
            self._homes[model] = home
            self._counts[home] += 1
        self._homes.move_to_end(model)
        if len(self._homes) > _MOST_SUBJECTS:
            self._counts[self._homes.popitem(last=False)[1]] -= 1
        return [home, *(replica for replica in order if replica != home)]

    def _move_out(self, replicas: Collection[str]) -> None:
        if any(replica not in replicas for replica in self._counts):
            self._homes = OrderedDict((model, home) for model, home in self._homes.items() if home in replicas)
            self._counts = Counter(self._homes.values())


class HotSubjects:
    """Which subjects are hot: those that alone ask for more than one replica's share of the work.

    They gain by another replica. The others would pay there for a load, and push out who lives there, while at home
    subjects take turns: a long queue of a hot one costs them one turn.
    """

    def __init__(self) -> None:
        """Nobody has asked for anything."""
        self._recent: deque[str] = deque()
        self._counts: Counter[str] = Counter()

    def note(self, model: str) -> None:
        """Count an order."""
        self._recent.append(model)
        self._counts[model] += 1
        if len(self._recent) > _RECENT:
            oldest = self._recent.popleft()
            self._counts[oldest] -= 1
            if not self._counts[oldest]:
                del self._counts[oldest]

    def is_hot(self, model: str, replicas: int) -> bool:
        """Whether the subject's part of the last orders is more than that of one of so many replicas."""
        return self._counts[model] * replicas > max(len(self._recent), _FEWEST)


def by_cost(ranked: list[str], queues: Mapping[str, int], escape: float) -> list[str]:
    """Replicas by the length of their queue, where each step away from home counts as `escape` requests more."""
    costs = {replica: queues.get(replica, 0) + escape * rank for rank, replica in enumerate(ranked)}
    return sorted(ranked, key=lambda replica: costs[replica])


class SubjectRouter(RequestRouter):
    """Sends each order to its subject's home, or to the next replica when the home's queue is longer by `escape`; for a
    subject that is not hot, by several times that."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Called by Ray Serve with the router's arguments."""
        self._escape: float = kwargs["escape"]
        self._subjects, self._demand = SubjectPlacement(), HotSubjects()

    def on_request_routed(self, pending_request: PendingRequest, replica_id: Any, result: Any) -> None:
        """Called by Ray Serve when a replica has accepted an order."""
        self._demand.note(pending_request.args[0].model)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas in order of preference; Ray Serve takes the first that is not full."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        order = pending_request.args[0]
        assert isinstance(order, GenerationRequest)
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        queues = {name: self.replica_queue_len_cache.get(replica.replica_id) or 0 for name, replica in replicas.items()}
        ranked = self._subjects.ranked(order.model, replicas)
        hot = self._demand.is_hot(order.model, len(replicas))
        return [[replicas[name]] for name in by_cost(ranked, queues, self._escape * (1.0 if hot else _COLD))]
