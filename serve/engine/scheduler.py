"""Whose turn it is on the device: images of one subject together, the subjects in fair turns."""

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
    """One image of an order, and where to send it."""

    order: GenerationRequest
    number: int
    tensors: Mapping[str, Tensor]
    results: asyncio.Queue[DrawnImage | Exception]
    abandoned: bool = False
    since: float = field(default_factory=time.perf_counter)

    @property
    def cost(self) -> int:
        """What the image takes of the device, in pixels times steps."""
        return self.order.width * self.order.height * self.order.steps

    @property
    def kind(self) -> tuple[object, ...]:
        """What images of one batch must have in common."""
        order = self.order
        return (order.width, order.height, order.steps, order.guidance, order.negative_prompt is None)


class FairScheduler:
    """Waiting jobs by subject. The next turn is that of the subject that has had the least of the device.

    This is start-time fair queueing: a subject's account starts at the account of the turn that is served when the
    subject comes, so that it neither pays for having been away nor gains by it.
    """

    def __init__(self) -> None:
        """Nobody waits."""
        self._waiting: dict[str, deque[Job]] = {}
        self._accounts: dict[str, int] = {}
        self._now = 0

    def __len__(self) -> int:
        """How many jobs wait."""
        return sum(len(jobs) for jobs in self._waiting.values())

    def add(self, job: Job) -> None:
        """Let a job wait behind those of its subject."""
        model = job.order.model
        if model not in self._waiting:
            self._waiting[model] = deque()
            self._accounts[model] = max(self._accounts.get(model, 0), self._now)
        self._waiting[model].append(job)

    def remove(self, job: Job) -> None:
        """Forget a job if it still waits."""
        model = job.order.model
        if job in self._waiting.get(model, ()):
            self._waiting[model].remove(job)
            self._forget(model)

    def take(self, most: int) -> list[Job]:
        """The next batch: at most so many jobs of one subject and kind, oldest first; there must be some."""
        model = min(self._waiting, key=lambda name: self._accounts[name])
        waiting = self._waiting[model]
        batch = [job for job in waiting if job.kind == waiting[0].kind][:most]
        self._waiting[model] = deque(job for job in waiting if job not in batch)
        self._now = self._accounts[model]
        self._accounts[model] += sum(job.cost for job in batch)
        self._forget(model)
        return batch

    def _forget(self, model: str) -> None:
        if not self._waiting[model]:
            del self._waiting[model]
        if not self._waiting:
            self._now = max(self._accounts.values())
        settled = [name for name, spent in self._accounts.items() if spent <= self._now and name not in self._waiting]
        for name in settled:
            del self._accounts[name]
