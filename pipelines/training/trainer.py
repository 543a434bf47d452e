"""A worker of a lane: it trains one run after another, and pays for its start-up once.

The base weights are read once a host and stay in its memory; process group and compiled kernels stay. Every run has an
engine of its own, built as in a new process, so that its weights do not depend on what the lane trained before.
"""

from __future__ import annotations

import gc
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
import torch
import torch.distributed as dist
from torch import Tensor

from dreambooth.backbones import Backbone
from dreambooth.methods.teacher import Teacher
from dreambooth.runs import RunSpec
from dreambooth.store import SubjectStore
from pipelines.training import training_set
from pipelines.training.batches import Batches
from pipelines.training.checkpoints import CheckpointWriter, last_checkpoint
from pipelines.training.host_tensors import Host, HostTensors
from pipelines.training.measures import measures_of
from pipelines.training.preemption import Preempted, PreemptionSignal, PreemptionWatcher, ray_drains
from pipelines.training.prefetch import Prefetch
from pipelines.training.train_step import passes_of, train_step

if TYPE_CHECKING:
    from pipelines.engine.engine import EMA

_FLUSH_EVERY = 5


Report = Callable[[int, int, list[dict[str, float]]], None]
"""Called on every rank with a run's number, the first step of some that are done, and their measures."""


def train_lane(config: dict[str, Any]) -> None:
    """What one rank of a lane does: take runs from the queue and train them until there are none left."""
    from pipelines.runtime.console import quiet_libraries

    quiet_libraries()
    runs: Sequence[RunSpec] = config["runs"]
    lane, queue, log = config["lane"], config["queue"], config["log"]
    if not torch.cuda.is_available():
        torch.set_num_threads(runs[0].lane.cpus_per_worker)
    rank = ray.train.get_context().get_world_rank()

    def report(number: int, first: int, rows: list[dict[str, float]]) -> None:
        if rank == 0:
            log.add.remote(number, first, rows)
        ray.train.report({"run": runs[number].key, "step": first + len(rows) - 1, **rows[-1]})

    def mark_preempted() -> None:
        if rank == 0:
            ray.get(queue.mark_preempted.remote(lane))

    store, nvme_path = SubjectStore(config["store"]), config["nvme_path"]
    worker = Worker(
        store, config["checkpoint_every"], report, nvme_path, drained=ray_drains, mark_preempted=mark_preempted
    )
    while (number := worker.agree(lambda: ray.get(queue.take.remote(lane)))) is not None:
        failure = None
        try:
            worker.train(number, runs[number])
        except ArithmeticError as error:  # of the run alone, and seen by all ranks alike: the lane continues
            failure = str(error)
        except Preempted:
            raise
        except Exception as error:
            ray.get(queue.failing.remote(lane, f"{type(error).__name__}: {error}"))
            raise
        if rank == 0:
            ray.get(queue.finish.remote(lane, failure))


class Worker:
    """One rank of a process group, with what it keeps from one run to the next."""

    def __init__(
        self,
        store: SubjectStore,
        checkpoint_every: int,
        report: Report,
        nvme_path: str | None = None,
        *,
        drained: Callable[[], bool] = lambda: False,
        mark_preempted: Callable[[], None] = lambda: None,
    ) -> None:
        """Join the group, which is there already.

        `drained` tells whether a node of the group is about to be taken away; `mark_preempted` is called on every rank
        when the group will end by no fault of the run.
        """
        self._store, self._every, self._report, self._nvme_path = store, checkpoint_every, report, nvme_path
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._attempt = self.agree(lambda: uuid.uuid4().hex[:12])
        self._watcher, self._mark_preempted = PreemptionWatcher(drained), mark_preempted
        self._host = Host()
        self._kept: tuple[str, tuple[Backbone, HostTensors]] | None = None

    def agree(self, decide: Callable[[], Any]) -> Any:
        """What rank 0 decides, on all ranks."""
        decision = [decide() if self._rank == 0 else None]
        dist.broadcast_object_list(decision)
        return decision[0]

    def _base(self, run: RunSpec) -> tuple[Backbone, HostTensors]:
        """The run's backbone and its weights, read when the lane is new to them."""
        from pipelines.training.setup import read_base

        if self._kept is None or self._kept[0] != run.backbone:
            self._kept = None  # two may not fit in memory side by side
            backbone = self._store.open_backbone(run.backbone)
            self._kept = run.backbone, (backbone, HostTensors(self._host, lambda: read_base(run, backbone)))
        return self._kept[1]

    def train(self, number: int, run: RunSpec) -> None:
        """Train a run from its last checkpoint to its last step."""
        from pipelines.training.setup import build_engine

        found = self.agree(lambda: last_checkpoint(self._store, run))
        step = 0 if found is None else found.step
        if step == run.training.steps:
            return
        backbone, base = self._base(run)
        with tempfile.TemporaryDirectory(dir=self._nvme_path) as disk:
            state = {} if found is None else HostTensors(self._host, found.read)
            engine, average, teacher = build_engine(run, backbone, base, state, step, disk)
            del state
            try:
                self._train(number, run, backbone, engine, average, teacher, step)
            finally:
                engine.destroy()
                del engine, average, teacher
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

    def _train(
        self,
        number: int,
        run: RunSpec,
        backbone: Backbone,
        engine: Any,
        average: EMA | None,
        teacher: Teacher | None,
        step: int,
    ) -> None:
        writer = CheckpointWriter(self._store, run, self._rank, self._world, self._attempt)
        pending: list[Tensor] = []
        flushed = time.monotonic()
        with self._rows(run, backbone, engine.device) as rows:
            while step < run.training.steps:
                measures = train_step(engine, run, backbone, rows, step, teacher)
                if measures is None:
                    continue  # the same step again, so that every step updates the weights once
                pending.append(measures)
                step += 1
                if average is not None:
                    average.update(step)
                final = step == run.training.steps
                signal = self._watcher.poll()
                due = step % self._every == 0 or final or signal is not PreemptionSignal.NONE
                if due or len(pending) == _FLUSH_EVERY:
                    measured = measures_of(pending, step, run, time.monotonic() - flushed)
                    pending, flushed = [], time.monotonic()
                    self._report(number, step - len(measured) + 1, measured)
                if due:
                    writer.write(_state(engine, average, final), step)
                if signal is not PreemptionSignal.NONE:
                    self._save_before_preemption(signal, writer)
        writer.wait()

    @contextmanager
    def _rows(self, run: RunSpec, backbone: Backbone, device: torch.device) -> Iterator[Prefetch]:
        """The rows of this rank's steps, from a copy of the run's training set."""
        samples = [samples for samples, _ in passes_of(run, self._rank, self._world)]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "training_set.safetensors"
            path.write_bytes(training_set.location_of(self._store, run).read_bytes())
            with Prefetch(Batches(run, backbone, path), samples, run.training.steps, device) as rows:
                yield rows

    def _save_before_preemption(self, signal: PreemptionSignal, writer: CheckpointWriter) -> None:
        """Make sure that the checkpoint just begun is whole, before anything takes the group away."""
        writer.wait()
        self._watcher.barrier()
        self._mark_preempted()
        if signal is PreemptionSignal.TERMINATED:
            raise Preempted("a worker was sent SIGTERM; the state is safe, and training continues from it")


def _state(engine: Any, average: EMA | None, final: bool) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint holds: everything, or at the end the weights to publish alone."""
    from pipelines.engine.engine import AVERAGE, PARAMETER, full_state

    if average is None or not final:
        yield from full_state(engine, with_moments=not final)
    if average is not None:
        with average.in_place_of_masters():
            yield from full_state(engine, with_moments=False, prefix=PARAMETER if final else AVERAGE)
