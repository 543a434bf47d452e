"""The order in which the device draws images: one subject in a batch, fairly among subjects."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from serve.request import DrawnImage, GenerationRequest


@dataclass(eq=False)
class Job:
    """One image of a request, and the queue for its results."""

    request: GenerationRequest
    number: int
    tensors: Mapping[str, Tensor]
    results: asyncio.Queue[DrawnImage | Exception]
    cancelled: bool = False
    since: float = field(default_factory=time.perf_counter)

    @property
    def cost(self) -> int:
        """The device time of the image, in pixels times steps."""
        return self.request.width * self.request.height * self.request.steps

    @property
    def kind(self) -> tuple[object, ...]:
        """What the images of one batch must have in common."""
        request = self.request
        return (request.width, request.height, request.steps, request.guidance, request.negative_prompt is None)


class FairScheduler:
    """A queue of jobs for each subject version; the next batch is of the one that has used the least device time.

    This is start-time fair queueing (Goyal et al., 1996): a version that becomes active starts at the virtual time of
    the batch being drawn, so that it neither pays nor gains for having been idle.
    """

    def __init__(self) -> None:
        """Start with empty queues."""
        self._waiting: dict[str, deque[Job]] = {}
        self._used: dict[str, int] = {}
        self._virtual_time = 0

    def __len__(self) -> int:
        """The number of jobs in all queues."""
        return sum(len(jobs) for jobs in self._waiting.values())

    def add(self, job: Job) -> None:
        """Append a job to the queue of its version."""
        model = job.request.model
        if model not in self._waiting:
            self._waiting[model] = deque()
            self._used[model] = max(self._used.get(model, 0), self._virtual_time)
        self._waiting[model].append(job)

    def remove(self, job: Job) -> None:
        """Remove a job if it is still in a queue."""
        model = job.request.model
        if job in self._waiting.get(model, ()):
            self._waiting[model].remove(job)
            self._drop_idle(model)

    def take(self, size: int) -> list[Job]:
        """The next batch: at most `size` jobs of one version and kind, oldest first; the queues must not be empty."""
        model = min(self._waiting, key=lambda name: self._used[name])
        waiting = self._waiting[model]
        batch = [job for job in waiting if job.kind == waiting[0].kind][:size]
        self._waiting[model] = deque(job for job in waiting if job not in batch)
        self._virtual_time = self._used[model]
        self._used[model] += sum(job.cost for job in batch)
        self._drop_idle(model)
        return batch

    def _drop_idle(self, model: str) -> None:
        if not self._waiting[model]:
            del self._waiting[model]
        if not self._waiting:
            self._virtual_time = max(self._used.values())
        idle = [name for name, used in self._used.items() if used <= self._virtual_time and name not in self._waiting]
        for name in idle:
            del self._used[name]
