"""Checkpoints of whole float32 tensors: safetensors files, one a rank, and a JSON file; nothing of ZeRO in them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dreambooth.storage import Location


def write_checkpoint(folder: Path, state: Iterable[tuple[str, Tensor]], step: int, rank: int, world: int) -> None:
    """Write this rank's share of the state, every `world`-th tensor; a collective, as `state` is."""
    share = {}
    for number, (name, value) in enumerate(state):
        if number % world == rank:
            share[name] = value.detach().cpu().clone()
    save_file(share, folder / f"state-{rank:05d}-of-{world:05d}.safetensors")
    if rank == 0:
        (folder / "checkpoint.json").write_text(json.dumps({"step": step, "files": world}))


def fetch_checkpoint(checkpoint: Location) -> tuple[int, dict[str, Tensor]]:
    """The step and the whole state of a checkpoint in a store, on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.download(Path(folder))
        return read_checkpoint(Path(folder))


def read_checkpoint(folder: Path) -> tuple[int, dict[str, Tensor]]:
    """The step and the whole state of a checkpoint, on the CPU."""
    meta = json.loads((folder / "checkpoint.json").read_text())
    state: dict[str, Tensor] = {}
    for rank in range(meta["files"]):
        with safe_open(folder / f"state-{rank:05d}-of-{meta['files']:05d}.safetensors", "pt") as file:
            state |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    return meta["step"], state
