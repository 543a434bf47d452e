"""Fine-tuning with Ray Train and DeepSpeed ZeRO: training sets in, checkpoints of whole float32 tensors out.

Lanes, each a group of workers, train runs one after another from one queue. The last checkpoint of a run holds the
parameters alone: it is the result, from which `publish` takes the weights.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, UserCallback
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tensorboardX import SummaryWriter

from dreambooth.runs import RunSpec, WorkerGroup
from dreambooth.store import SubjectStore
from pipelines.runtime.console import Display, ProgressLine
from pipelines.stages.previews import Previews
from pipelines.training.checkpoints import final_checkpoint, last_checkpoint
from pipelines.training.preemption import ListeningTorchConfig
from pipelines.training.run_queue import LaneQueue, TrainingLog
from pipelines.training.trainer import train_lane


def finetune(
    store: SubjectStore,
    runs: Sequence[RunSpec],
    checkpoint_every: int,
    display: Display,
    *,
    lanes: int | None = None,
    min_workers: int | None = None,
    nvme_path: str | None = None,
    previews: bool = False,
) -> dict[str, str]:
    """Train runs of one lane and backbone to their last steps, from their last checkpoints if they were killed.

    Args:
        store: where the training sets are, and the checkpoints go.
        runs: what to train.
        checkpoint_every: steps between checkpoints.
        display: where progress is shown.
        lanes: how many groups of workers; by default as many as the cluster has room for.
        min_workers: continue with so few workers when others are lost; by default none may be missing.
        nvme_path: a folder on every node's own disk, for what is offloaded to one.
        previews: let an actor of its own draw samples of each checkpoint, if the cluster has room for it.

    Returns:
        Why runs are not trained, by their keys; the others are.
    """
    total = sum(run.training.steps for run in runs)
    found = [last_checkpoint(store, run) for run in runs]
    reached = {number: last.step for number, last in enumerate(found) if last is not None}
    left = [run for run in runs if final_checkpoint(store, run) is None]
    with display.progress("fine-tune", total, "steps", done=sum(reached.values())) as line:
        if not left:
            return {}
        # Like Ray Train's own controllers they live with the driver: a worker's node takes only workers with it.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        queue = ray.remote(LaneQueue).options(num_cpus=0, scheduling_strategy=here).remote(len(left))
        log = ray.remote(TrainingLog).options(num_cpus=0, scheduling_strategy=here).remote()
        count = min(len(left), lanes or lanes_with_room(left[0].lane))
        config = {
            "runs": left,
            "store": store.root.uri,
            "nvme_path": nvme_path,
            "log": log,
            "queue": queue,
            "checkpoint_every": checkpoint_every,
        }
        steps = {run.key: reached.get(number, 0) for number, run in enumerate(runs)}
        with (
            _watching(store, left, log, line, steps, display if previews else None),
            ThreadPoolExecutor(count) as pool,
        ):
            ended = [pool.submit(_run_lane, store, config | {"lane": lane}, min_workers) for lane in range(count)]
        outcomes = ray.get(queue.outcomes.remote())
    broken = next((str(error) for lane in ended if (error := lane.result()) is not None), "its lane ended early")
    return {
        run.key: outcomes.get(number, broken) or ""
        for number, run in enumerate(left)
        if outcomes.get(number, broken) is not None
    }


def lanes_with_room(lane: WorkerGroup) -> int:
    """How many such lanes the cluster has resources for; at least one, which waits for them."""
    have = ray.cluster_resources()
    each = {"CPU": lane.cpus_per_worker * lane.workers, "GPU": lane.gpus_per_worker * lane.workers}
    return max(1, min(int(have.get(name, 0) / wanted) for name, wanted in each.items() if wanted))


def _run_lane(store: SubjectStore, config: dict[str, Any], min_workers: int | None) -> TrainingFailedError | None:
    """Run one lane to the end of the queue; returns what ended it before."""
    lane: WorkerGroup = config["runs"][0].lane
    notes = store.root / "runs" / f"lane-{uuid.uuid4().hex[:12]}"
    trainer = TorchTrainer(
        train_lane,
        train_loop_config=config,
        torch_config=ListeningTorchConfig(backend="nccl" if lane.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=lane.workers if min_workers is None else (min_workers, lane.workers),
            use_gpu=lane.gpus_per_worker > 0,
            resources_per_worker={
                "CPU": lane.cpus_per_worker,
                **({"GPU": lane.gpus_per_worker} if lane.gpus_per_worker else {}),
            },
        ),
        run_config=RunConfig(
            name="train",
            storage_path=notes.path,
            storage_filesystem=notes.filesystem,
            # The queue gives a run up whose workers die again and again; the lane itself has others to train.
            failure_config=FailureConfig(max_failures=-1),
            callbacks=[_FailureCount(config["queue"], config["lane"])],
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        return error
    finally:
        notes.delete()
    return None


class _FailureCount(UserCallback):
    """Tells the queue of each failure of a lane's workers; ends a lane whose workers do not even get to a run."""

    def __init__(self, queue: Any, lane: int) -> None:
        self._queue, self._lane = queue, lane

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        if not ray.get(self._queue.failed.remote(self._lane)):
            [error, *_] = worker_exceptions.values()
            raise RuntimeError(f"training workers fail before they take up a run: {error}")


@contextmanager
def _watching(
    store: SubjectStore,
    runs: Sequence[RunSpec],
    log: Any,
    line: ProgressLine,
    steps: dict[str, int],
    previews: Display | None,
) -> Iterator[None]:
    """Show the losses and write all measures as TensorBoard events beside each run, while the block trains."""
    done = threading.Event()
    events = Path(tempfile.mkdtemp(prefix="tensorboard-"))
    writers: dict[int, SummaryWriter] = {}
    watched: dict[int, Previews] = {}

    def close(number: int) -> None:
        if number in watched:
            watched.pop(number).close()
        writers.pop(number).close()
        folder = events / runs[number].key
        (store.root / "runs" / runs[number].key / "tensorboard").upload(folder)
        shutil.rmtree(folder)

    def take() -> None:
        for number, step, measures in ray.get(log.take.remote()):
            run = runs[number]
            if number not in writers:
                writers[number] = SummaryWriter(str(events / run.key), write_to_disk=True)
                if previews is not None and run.draws_alone:
                    watched[number] = Previews(store, run, previews)
            for name, value in measures.items():
                writers[number].add_scalar(name, value, step)
            steps[run.key] = step
            instance, prior = measures["loss/instance"], measures["loss/prior"]
            line.reach(sum(steps.values()), f"{run.subject}: loss: instance {instance:.4f}, prior {prior:.4f}")
        for number, preview in watched.items():
            preview.take(writers[number])
        for number in [number for number in writers if steps[runs[number].key] == runs[number].training.steps]:
            close(number)

    def watch() -> None:
        while not done.wait(0.5):
            take()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        take()
        for number in list(writers):
            close(number)
        shutil.rmtree(events)
