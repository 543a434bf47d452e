"""The rows of the next step, drawn while the device is at this one: nothing waits for what the host does for them."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Protocol

import torch

from pipelines.training.batches import Minibatch

DrawnRows = dict[range, list[Minibatch]]


class Rows(Protocol):
    """What gives the rows of a step: `Batches`, or these drawn ahead."""

    def rows(self, step: int, samples: range) -> list[Minibatch]:
        """Those of the global samples `samples`: of the photos, then as many of class-prior images."""


class Prefetch:
    """Rows on a device, drawn one step ahead by a thread: no bit of them is another, as streams draw them."""

    def __init__(self, batches: Rows, samples: Iterable[range], steps: int, device: torch.device) -> None:
        """Draw what `samples` names in each of the `steps`; from here on `batches` is the thread's alone."""
        self._batches, self._samples, self._steps, self._device = batches, set(samples), steps, device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: tuple[int, Future[DrawnRows]] | None = None
        self._step, self._here = -1, DrawnRows()

    def __enter__(self) -> Prefetch:
        """Itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the thread."""
        self._thread.shutdown()

    def rows(self, step: int, samples: range) -> list[Minibatch]:
        """As of `Batches`. A step may be asked for again; when another is, the one after it begins to be drawn."""
        if step != self._step:
            drawn = self._drawn(step)
            if step + 1 < self._steps:
                self._ahead = step + 1, self._thread.submit(self._draw, step + 1)
            # From pinned memory, behind what the device still has to do: the host does not wait for it.
            here = {key: [rows.to(self._device) for rows in minibatches] for key, minibatches in drawn.items()}
            self._step, self._here = step, here
        return self._here[samples]

    def _drawn(self, step: int) -> DrawnRows:
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = step, self._thread.submit(self._draw, step)
        return self._ahead[1].result()

    def _draw(self, step: int) -> DrawnRows:
        drawn = {samples: self._batches.rows(step, samples) for samples in self._samples}
        if self._device.type == "cpu":
            return drawn
        return {samples: [rows.pinned() for rows in minibatches] for samples, minibatches in drawn.items()}
