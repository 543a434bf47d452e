"""Tensors that one rank of each host reads and holds, and hands to the host's other ranks one by one."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Host:
    """The ranks of the process group that run on this rank's host; the first of them leads."""

    def __init__(self) -> None:
        """Find them; a collective of all ranks."""
        rank = dist.get_rank()
        names: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(names, socket.gethostname())
        for name in dict.fromkeys(names):
            ranks = [other for other, where in enumerate(names) if where == name]
            # Over gloo, since what it carries is in host memory, whatever the training itself speaks.
            group = dist.new_group(ranks, backend="gloo")
            if rank in ranks:
                self._group, self._leader, self._alone = group, ranks[0], len(ranks) == 1
        self.leads = rank == self._leader

    def agree(self, decision: Any) -> Any:
        """The leader's decision, on all ranks of the host."""
        decisions = [decision]
        dist.broadcast_object_list(decisions, self._leader, self._group)
        return decisions[0]

    def share(self, tensor: Tensor) -> None:
        """Write the leader's tensor, on the CPU, over those of the host's other ranks."""
        if not self._alone:
            dist.broadcast(tensor, self._leader, self._group)


class HostTensors(Mapping[str, Tensor]):
    """Tensors by name on the CPU, of which a host holds one copy: that of the rank that leads it.

    To make it and to look a tensor up are collectives of the host's ranks. The others get copies, for as long as they
    keep them; on the leading rank it is the tensor itself, which nobody may change.
    """

    def __init__(self, host: Host, read: Callable[[], Mapping[str, Tensor]]) -> None:
        """Hold what `read` gives; it is called on the rank that leads alone."""
        self._host = host
        self._held = read() if host.leads else {}
        self._kinds: dict[str, tuple[torch.Size, torch.dtype]]
        self._kinds = host.agree({name: (tensor.shape, tensor.dtype) for name, tensor in self._held.items()})

    def __getitem__(self, name: str) -> Tensor:
        """The whole tensor."""
        shape, dtype = self._kinds[name]
        tensor = self._held[name].contiguous() if self._host.leads else torch.empty(shape, dtype=dtype)
        self._host.share(tensor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        """The names; no collective."""
        return iter(self._kinds)

    def __len__(self) -> int:
        """How many there are; no collective."""
        return len(self._kinds)

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor; no collective."""
        return name in self._kinds
