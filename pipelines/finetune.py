"""Fine-tuning with Ray Train and DeepSpeed ZeRO: a training set in, checkpoints of whole float32 tensors out.

The last checkpoint of a run holds the parameters alone: it is the result, from which `publish` takes the weights.
"""

from __future__ import annotations

import math
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from tensorboardX import SummaryWriter
from torch import Tensor, nn

from dreambooth.backbones import Backbone, Conditioning
from dreambooth.diffusion import PriorPreservationLoss, prior_preservation_loss
from dreambooth.learning_rate import learning_rate_factor
from dreambooth.memory import enable_gradient_checkpointing, in_precision
from dreambooth.sampling import DTYPES
from dreambooth.storage import Location
from dreambooth.store import SubjectStore
from pipelines import training_set
from pipelines.batches import Batches
from pipelines.checkpoints import read_checkpoint, write_checkpoint
from pipelines.console import Display, Stage
from pipelines.run import Run, Training
from pipelines.training_log import TrainingLog

if TYPE_CHECKING:
    from pipelines.zero import Average

_FLUSH_EVERY = 5
_RETRIES = 2


class Trainable(nn.Module):
    """All networks that are trained, as one module for one engine."""

    def __init__(self, backbone: Backbone, networks: dict[str, nn.Module]) -> None:
        """Hold `networks` by component name."""
        super().__init__()
        self.backbone = backbone
        self.networks = nn.ModuleDict(networks)

    def groups(self, training: Training) -> list[dict[str, Any]]:
        """One group of parameters a network: text encoders have a learning rate of their own."""
        groups = []
        for name, network in self.networks.items():
            of_text = name in self.backbone.text_encoders
            rate = training.text_encoder_learning_rate if of_text else training.learning_rate
            groups.append({"params": list(network.parameters()), "lr": rate, "initial_lr": rate})
        return groups

    def forward(self, z_t: Tensor, t: Tensor, conditioning: Conditioning, ids: dict[str, Tensor]) -> Tensor:
        """The denoiser's prediction; prompts are embeddings, or token ids (B, length) for trained text encoders."""
        if ids:
            encoders = {name: self.networks[name] for name in self.backbone.text_encoders}
            conditioning = conditioning | self.backbone.encode_text(encoders, ids)
        conditioning = in_precision(conditioning, z_t.dtype)
        return self.backbone.predict(self.networks[self.backbone.denoiser], z_t, t, conditioning)


def step_loss(engine: Any, run: Run, backbone: Backbone, rows: dict[str, Any]) -> PriorPreservationLoss:
    """Eq. 2 of one micro-batch."""
    device = engine.device
    x, epsilon, t = rows["x"].to(device), rows["epsilon"].to(device), rows["t"].to(device)
    schedule = backbone.schedule
    z_t = schedule.add_noise(x, epsilon, t)
    conditioning = {name: value.to(device) for name, value in rows["conditioning"].items()}
    ids = {name: value.to(device) for name, value in rows["ids"].items()}
    prediction = engine(z_t.to(DTYPES[run.training.precision]), t, conditioning, ids)
    weight = schedule.weight(t, run.training.min_snr_gamma)
    target = schedule.target(x, epsilon, t)
    return prior_preservation_loss(prediction, target, weight, rows["instances"], run.training.prior_weight)


def train_step(engine: Any, run: Run, backbone: Backbone, batches: Batches, step: int) -> Tensor | None:
    """Do update `step`, counted from 0, of this rank: instance term, prior term and gradient norm (3,), or None.

    None says that the gradients overflowed fp16: nothing was updated, and the step is to be done again.
    """
    from pipelines.zero import gradient_norm, overflowed, set_learning_rate

    accumulated, rank, world = run.training.gradient_accumulation, dist.get_rank(), dist.get_world_size()
    micro_batch = run.training.batch // (world * accumulated)
    set_learning_rate(engine, _rate_factor(run.training, step))
    terms = torch.zeros(2, device=engine.device)
    for micro_step in range(accumulated):
        start = (micro_step * world + rank) * micro_batch
        loss = step_loss(engine, run, backbone, batches.rows(step, range(start, start + micro_batch)))
        engine.backward(loss.total)
        engine.step()
        terms += torch.stack([loss.instance.detach(), _detached(loss.prior, engine.device)])
    if overflowed(engine):
        return None
    return torch.cat([terms / accumulated, gradient_norm(engine)[None]])


def train_worker(config: dict[str, Any]) -> None:
    """What one rank of the lane does: load the backbone, resume, train to the last step, checkpoint."""
    from pipelines.console import quiet_libraries
    from pipelines.zero import Average, restore, restore_average, start_engine

    quiet_libraries()
    run: Run = config["run"]
    store = SubjectStore(config["store"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    if not torch.cuda.is_available():
        torch.set_num_threads(run.lane.cpus_per_worker)

    backbone = store.open_backbone(run.backbone)
    networks = {name: backbone.load(name) for name in run.training.trained}
    if run.training.gradient_checkpointing:
        for network in networks.values():
            enable_gradient_checkpointing(network)
    module = Trainable(backbone, networks)
    step = 0
    state: dict[str, Tensor] = {}
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            step, state = read_checkpoint(Path(folder))
        module.load_state_dict({name: state[f"param.{name}"] for name, _ in module.named_parameters()}, strict=False)
        if step == run.training.steps:
            return
    with tempfile.TemporaryDirectory(dir=config["nvme_path"]) as folder:
        engine = start_engine(module, module.groups(run.training), run.training, run.lane, folder)
        average = Average(engine, run.training.ema_decay) if run.training.ema_decay else None
        if state:
            restore(engine, state, step)
            if average is not None:
                restore_average(engine, average, state)
            del state

        path = Path(folder) / "training_set.safetensors"
        path.write_bytes(training_set.location_of(store, run).read_bytes())
        batches = Batches(run, backbone, path)
        pending: list[Tensor] = []
        flushed = time.monotonic()
        while step < run.training.steps:
            measures = train_step(engine, run, backbone, batches, step)
            if measures is None:
                continue  # the same step again, so that every step updates the weights once
            pending.append(measures)
            step += 1
            if average is not None:
                average.update(step)
            due = step % config["checkpoint_every"] == 0 or step == run.training.steps
            if due or len(pending) == _FLUSH_EVERY:
                rows = _measures(pending, step, run, time.monotonic() - flushed)
                pending, flushed = [], time.monotonic()
                if rank == 0:
                    config["log"].add.remote(step - len(rows) + 1, rows)
            if due:
                final = step == run.training.steps
                with tempfile.TemporaryDirectory() as saved:
                    write_checkpoint(Path(saved), _state(engine, average, final), step, rank, world)
                    ray.train.report({"step": step}, checkpoint=Checkpoint.from_directory(saved))


def _detached(term: Tensor | None, device: torch.device) -> Tensor:
    return torch.zeros((), device=device) if term is None else term.detach()


def _rate_factor(training: Training, step: int) -> float:
    return learning_rate_factor(step, training.steps, training.warmup_steps, training.schedule)


def _state(engine: Any, average: Average | None, final: bool) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint holds: everything, or at the end the weights to publish alone."""
    from pipelines.zero import AVERAGE, PARAMETER, full_state

    if average is None or not final:
        yield from full_state(engine, with_moments=not final)
    if average is not None:
        with average.in_place_of_masters():
            yield from full_state(engine, with_moments=False, prefix=PARAMETER if final else AVERAGE)


def _measures(pending: list[Tensor], step: int, run: Run, seconds: float) -> list[dict[str, float]]:
    """The measures of the last steps up to `step`, averaged over the ranks; the one host synchronization.

    `pending` holds for each step the instance and the prior term and the gradient's norm (3,). Raises ArithmeticError
    when a loss is not finite.
    """
    averaged = torch.stack(pending)
    dist.all_reduce(averaged)
    first = step - len(pending) + 1
    speed = {"samples_per_second": len(pending) * run.training.batch / seconds, "memory_gib": _peak_memory() / 2**30}
    rows = []
    for number, (instance, prior, norm) in enumerate((averaged / dist.get_world_size()).tolist(), start=first):
        if not (math.isfinite(instance) and math.isfinite(prior)):
            raise ArithmeticError(
                f"the loss of subject {run.subject!r} is not finite at step {number}: instance term {instance}, prior "
                f"term {prior}; the last checkpoint is kept. Lower --learning-rate, or use --precision fp32"
            )
        rate = run.training.learning_rate * _rate_factor(run.training, number - 1)
        measures = {"loss/instance": instance, "loss/prior": prior, "learning_rate": rate, **speed}
        rows.append(measures | ({} if math.isnan(norm) else {"gradient_norm": norm}))
    return rows


def _peak_memory() -> int:
    """Bytes: the device's peak so far, or on the CPU this process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# -- the driver's side -------------------------------------------------------------------------------------------------


def result_of(store: SubjectStore, run: Run) -> Location:
    """Where the run notes its last checkpoint once it is trained."""
    return store.root / "runs" / run.key / "trained.json"


def finetune(
    store: SubjectStore, run: Run, checkpoint_every: int, display: Display, nvme_path: str | None = None
) -> Location:
    """Train a run to its last step, from its last checkpoint if it was killed; returns the final checkpoint."""
    marker = result_of(store, run)
    if marker.exists():
        with display.stage("fine-tune", run.training.steps, "steps", done=run.training.steps):
            return marker.parent / marker.read_json()["checkpoint"]
    folder = marker.parent
    log = ray.remote(TrainingLog).options(num_cpus=0).remote()
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "run": run,
            "store": store.root.uri,
            "log": log,
            "checkpoint_every": checkpoint_every,
            "nvme_path": nvme_path,
        },
        torch_config=TorchConfig(backend="nccl" if run.lane.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=run.lane.workers,
            use_gpu=run.lane.gpus_per_worker > 0,
            resources_per_worker={
                "CPU": run.lane.cpus_per_worker,
                **({"GPU": run.lane.gpus_per_worker} if run.lane.gpus_per_worker else {}),
            },
        ),
        run_config=RunConfig(
            name="finetune",
            storage_path=folder.path,
            storage_filesystem=folder.filesystem,
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=_RETRIES),
        ),
    )
    with display.stage("fine-tune", run.training.steps, "steps") as stage, _watching(log, stage, folder):
        result = trainer.fit()
    checkpoint = folder / "finetune" / Path(result.checkpoint.path).name
    marker.write_json({"checkpoint": f"finetune/{checkpoint.name}"})
    return checkpoint


@contextmanager
def _watching(log: Any, stage: Stage, folder: Location) -> Iterator[None]:
    """Show the losses and write all measures as TensorBoard events beside the run, while the block trains."""
    done = threading.Event()
    events = Path(tempfile.mkdtemp(prefix="tensorboard-"))
    writer = SummaryWriter(str(events), write_to_disk=True)

    def take() -> None:
        for step, measures in ray.get(log.take.remote()):
            for name, value in measures.items():
                writer.add_scalar(name, value, step)
            instance, prior = measures["loss/instance"], measures["loss/prior"]
            stage.reach(step, note=f"loss: instance {instance:.4f}, prior {prior:.4f}")

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
        writer.close()
        (folder / "tensorboard").upload(events)
        shutil.rmtree(events)
