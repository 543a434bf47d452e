"""Preemption: word that workers are about to be taken away, agreed on by all ranks without holding up a device.

It comes in two forms. Ray drains a node: the group may work until the node is gone, and Ray Train then starts it
again on others. Or a worker is sent SIGTERM: the whole group ends as soon as its state is safe, and is started again.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

_terminated = False


class PreemptionSignal(IntEnum):
    """What a group has been told; of two, the more urgent counts."""

    NONE = 0
    DRAINED = 1
    TERMINATED = 2


class Preempted(Exception):
    """Ends a worker that was told to go, after its state is safe."""


def listen() -> None:
    """Take the next SIGTERM for a preemption signal, and end the process at one after that.

    Only a process's main thread may do this.
    """
    before = signal.getsignal(signal.SIGTERM)

    def note(*_: Any) -> None:
        global _terminated
        _terminated = True
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)

    signal.signal(signal.SIGTERM, note)


class _ListeningBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_start(worker_group, backend_config)
        worker_group.execute(listen)


class ListeningTorchConfig(TorchConfig):
    """Ray Train's own, whose workers listen: the training loop itself is not on their main thread."""

    @property
    def backend_cls(self) -> Any:
        """torch's backend, which listens when it has made the process group."""
        return _ListeningBackend


class PreemptionWatcher:
    """Asks all ranks for signals, once an update, over a group of its own on the hosts.

    The answer to one update's question is read at the next, so that nobody waits for it.
    """

    def __init__(self, drained: Callable[[], bool]) -> None:
        """Join the group; `drained` tells what this rank knows of drained nodes. A collective."""
        self._drained = drained
        self._group = dist.new_group(backend="gloo")
        self._asked: tuple[torch.Tensor, Any] | None = None
        self._given = PreemptionSignal.NONE

    def poll(self) -> PreemptionSignal:
        """A signal that is new, the same on every rank. A collective; each signal is given once."""
        answer = PreemptionSignal.NONE
        if self._asked is not None:
            said, work = self._asked
            work.wait()
            answer = PreemptionSignal(int(said))
        told = PreemptionSignal.DRAINED if self._drained() else PreemptionSignal.NONE
        said = torch.tensor(PreemptionSignal.TERMINATED if _terminated else told)
        self._asked = said, dist.all_reduce(said, dist.ReduceOp.MAX, self._group, async_op=True)
        if answer <= self._given:
            return PreemptionSignal.NONE
        self._given = answer
        return answer

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(self._group)


def ray_drains() -> bool:
    """Whether Ray Train has told this worker that a node of its group is drained.

    The public `get_preemption_info` asks an actor in every call, and waits for all ranks: this is what it asks for.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None
