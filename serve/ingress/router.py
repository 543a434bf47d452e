"""The request router: a subject goes to the replica that has loaded it, until the queue there is too long."""

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
"""Requests in the window over which subjects are counted."""
_FEWEST = 64
"""Requests below which a share of them says little."""
_COLD = 4.0
"""Factor on `escape` for a subject that is not hot."""


class SubjectPlacement:
    """The replica that each subject version is assigned to.

    Rendezvous hashing moves few subjects when a replica is added or removed; but no replica is assigned more than its
    share, so that subjects which fit the memories of all replicas together fit each of them. Assignments are remembered
    in each ingress process, so two of these may disagree where hashing alone would have exceeded a share.
    """

    def __init__(self) -> None:
        """Start without assignments."""
        self._assigned: OrderedDict[str, str] = OrderedDict()
        self._counts: Counter[str] = Counter()

    def ranked(self, model: str, replicas: Collection[str]) -> list[str]:
        """The replicas in order of preference: the assigned one first."""
        ranking = sorted(replicas, key=lambda replica: hashlib.sha256(f"{replica}/{model}".encode()).digest())
        assigned = self._assigned.get(model)
        if assigned not in ranking:
            self._drop_lost(replicas)
            share = math.ceil((len(self._assigned) + 1) / len(ranking))
            assigned = next(replica for replica in ranking if self._counts[replica] < share)
            self._assigned[model] = assigned
            self._counts[assigned] += 1
        self._assigned.move_to_end(model)
        if len(self._assigned) > _MOST_SUBJECTS:
            self._counts[self._assigned.popitem(last=False)[1]] -= 1
        return [assigned, *(replica for replica in ranking if replica != assigned)]

    def _drop_lost(self, replicas: Collection[str]) -> None:
        if any(replica not in replicas for replica in self._counts):
            self._assigned = OrderedDict(
                (model, assigned) for model, assigned in self._assigned.items() if assigned in replicas
            )
            self._counts = Counter(self._assigned.values())


class HotSubjects:
    """Counts recent requests to find hot subjects: those that alone ask for more than one replica's share.

    A hot subject gains from a second replica. Another would pay for a load there and evict others, while on its own
    replica the scheduler is fair: a long queue of a hot subject delays it by one batch only.
    """

    def __init__(self) -> None:
        """Start without requests."""
        self._recent: deque[str] = deque()
        self._counts: Counter[str] = Counter()

    def note(self, model: str) -> None:
        """Count a request."""
        self._recent.append(model)
        self._counts[model] += 1
        if len(self._recent) > _RECENT:
            oldest = self._recent.popleft()
            self._counts[oldest] -= 1
            if not self._counts[oldest]:
                del self._counts[oldest]

    def is_hot(self, model: str, replicas: int) -> bool:
        """Whether the subject's share of the recent requests exceeds one replica's."""
        return self._counts[model] * replicas > max(len(self._recent), _FEWEST)


def by_cost(ranked: list[str], queues: Mapping[str, int], escape: float) -> list[str]:
    """Replicas by queue length, to which each rank in the preference adds `escape` requests."""
    costs = {replica: queues.get(replica, 0) + escape * rank for rank, replica in enumerate(ranked)}
    return sorted(ranked, key=lambda replica: costs[replica])


class SubjectRouter(RequestRouter):
    """Sends each request to the replica assigned to its subject.

    The next replica gets it when that queue is longer by `escape`; for a subject that is not hot, by a multiple of it.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Take the arguments from the deployment; called by Ray Serve."""
        self._escape: float = kwargs["escape"]
        self._placement, self._hot = SubjectPlacement(), HotSubjects()

    def on_request_routed(self, pending_request: PendingRequest, replica_id: Any, result: Any) -> None:
        """Count the request that a replica has accepted; called by Ray Serve."""
        self._hot.note(pending_request.args[0].model)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas in order of preference; Ray Serve takes the first that is not full."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        request = pending_request.args[0]
        assert isinstance(request, GenerationRequest)
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        queues = {name: self.replica_queue_len_cache.get(replica.replica_id) or 0 for name, replica in replicas.items()}
        ranked = self._placement.ranked(request.model, replicas)
        is_hot = self._hot.is_hot(request.model, len(replicas))
        return [[replicas[name]] for name in by_cost(ranked, queues, self._escape * (1.0 if is_hot else _COLD))]
