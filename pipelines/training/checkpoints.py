"""Checkpoints of whole float32 tensors, `runs/KEY/checkpoints/STEP`: nothing of ZeRO or of the world size in them.

A checkpoint exists exactly when its `checkpoint.json` does, which is written last and names every other file.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dreambooth.common.location import Location
from dreambooth.runs import RunSpec
from dreambooth.store import SubjectStore

_KEPT = 2
_SECONDS_BETWEEN_LOOKS = 0.1
_MARKER = "checkpoint.json"

State = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: the update that it was written after, and where."""

    step: int
    folder: Location

    def read(self) -> State:
        """The whole state, on the CPU."""
        state: State = {}
        with tempfile.TemporaryDirectory() as local:
            self.folder.download(Path(local))
            for name in self.folder_files():
                with safe_open(Path(local) / name, "pt") as file:
                    state |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        return state

    def folder_files(self) -> list[str]:
        """The names of its safetensors files."""
        return (self.folder / _MARKER).read_json()["files"]


def checkpoints(store: SubjectStore, run: RunSpec) -> list[Checkpoint]:
    """The run's whole checkpoints, oldest first."""
    folder = checkpoint_folder(store, run)
    found = (Checkpoint(int(name), folder / name) for name in folder.names())
    return [checkpoint for checkpoint in found if (checkpoint.folder / _MARKER).exists()]


def last_checkpoint(store: SubjectStore, run: RunSpec) -> Checkpoint | None:
    """The newest whole checkpoint of the run."""
    return next(reversed(checkpoints(store, run)), None)


def final_checkpoint(store: SubjectStore, run: RunSpec) -> Checkpoint | None:
    """The checkpoint of the last step, which holds what is published; None while the run is not trained."""
    last = last_checkpoint(store, run)
    return last if last is not None and last.step == run.training.steps else None


def checkpoint_folder(store: SubjectStore, run: RunSpec) -> Location:
    """Where the run's checkpoints are."""
    return store.root / "runs" / run.key / "checkpoints"


class CheckpointWriter:
    """Writes a rank's share of checkpoints while training goes on, one checkpoint at a time.

    Ranks share nothing but the store: when all shares have come there, rank 0 makes the checkpoint appear.
    """

    def __init__(self, store: SubjectStore, run: RunSpec, rank: int, world: int, attempt: str) -> None:
        """Write for one rank; `attempt` is the same on all ranks and of this worker group alone.

        Shares are named by it: those that a killed group left behind are not taken for this one's.
        """
        self._folder = checkpoint_folder(store, run)
        self._rank, self._names = rank, [f"{attempt}-{n:05d}-of-{world:05d}.safetensors" for n in range(world)]
        self._writing: threading.Thread | None = None
        self._error: Exception | None = None

    def write(self, state: Iterable[tuple[str, Tensor]], step: int) -> None:
        """Copy this rank's share of the state, every `world`-th tensor, and begin to write it.

        A collective, as `state` is. Waits for the checkpoint before, and raises what it failed by.
        """
        self.wait()
        share = {}
        for number, (name, value) in enumerate(state):
            if number % len(self._names) == self._rank:
                share[name] = value.detach().cpu().clone()
        self._writing = threading.Thread(target=self._write, args=(share, step), daemon=True)
        self._writing.start()

    def wait(self) -> None:
        """Wait until the last checkpoint is written: on rank 0 as a whole, elsewhere this rank's share."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._error is not None:
            raise self._error

    def _write(self, share: State, step: int) -> None:
        try:
            folder = self._folder / f"{step:08d}"
            with tempfile.TemporaryDirectory() as local:
                path = Path(local) / self._names[self._rank]
                save_file(share, path)
                (folder / path.name).upload_file(path)
            if self._rank == 0:
                self._complete(folder)
        except Exception as error:  # raised where the training loop sees it
            self._error = error

    def _complete(self, folder: Location) -> None:
        while not set(self._names) <= set(folder.names()):
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        (folder / _MARKER).write_json({"files": self._names})
        whole = [name for name in self._folder.names() if (self._folder / name / _MARKER).exists()]
        for name in self._folder.names():
            if name < min(whole[-_KEPT:]):
                (self._folder / name).delete()
