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
from collections.abc import Iterator, Sequence
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
from dreambooth.teacher import Teacher
from dreambooth.textual_inversion import LearnedEmbeds, TextualInversion
from pipelines import training_set
from pipelines.batches import Batches, Half, joined
from pipelines.checkpoints import read_checkpoint, write_checkpoint
from pipelines.console import Display, Stage
from pipelines.previews import Previews
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

    def forward(self, z_t: Tensor, t: Tensor, conditioning: Conditioning, ids: dict[str, Tensor]) -> Tensor:
        """The denoiser's prediction; prompts are embeddings, or token ids (B, length) for trained text encoders."""
        if ids:
            encoders = {name: self.networks[name] for name in self.backbone.text_encoders}
            conditioning = conditioning | self.backbone.encode_text(encoders, ids)
        conditioning = in_precision(conditioning, z_t.dtype)
        return self.backbone.predict(self.networks[self.backbone.denoiser], z_t, t, conditioning)


def trainable(run: Run, backbone: Backbone) -> nn.Module:
    """The module that a run trains, on the CPU with the weights that it begins with."""
    inversion = run.training.method == "textual-inversion"
    names = (backbone.denoiser, *backbone.text_encoders) if inversion else run.training.trained
    networks = {name: backbone.load(name) for name in names}
    if run.training.gradient_checkpointing:
        for network in networks.values():
            enable_gradient_checkpointing(network)
    if not inversion:
        return Trainable(backbone, networks)
    encoders = {name: networks[name] for name in backbone.text_encoders}
    embeds = LearnedEmbeds.of_noun(backbone, encoders, run.identifier, run.class_noun)
    return TextualInversion(backbone, networks, embeds)


def groups(module: nn.Module, training: Training, backbone: Backbone) -> list[dict[str, Any]]:
    """Parameters for AdamW with their learning rates: text encoders that are trained have one of their own."""
    of_text = tuple(f"networks.{name}." for name in backbone.text_encoders)
    text = [parameter for name, parameter in module.named_parameters() if name.startswith(of_text)]
    others = [parameter for name, parameter in module.named_parameters() if not name.startswith(of_text)]
    rates = [(others, training.learning_rate), (text, training.text_encoder_learning_rate)]
    return [{"params": chosen, "lr": rate, "initial_lr": rate} for chosen, rate in rates if chosen]


def step_loss(
    engine: Any, run: Run, backbone: Backbone, halves: Sequence[Half], teacher: Teacher | None = None
) -> PriorPreservationLoss:
    """Eq. 2 of one micro-batch; a teacher's prediction takes the place of the class-prior images as the target."""
    schedule, training = backbone.schedule, run.training
    halves = [half.to(engine.device) for half in halves]
    targets = [schedule.target(half.x, half.epsilon, half.t) for half in halves]
    if teacher is not None:
        # Ahead of the engine, so that its activations are gone before those are there that the backward pass needs.
        prior = halves[1]
        targets[1] = teacher(schedule.add_noise(prior.x, prior.epsilon, prior.t), prior.t, prior.conditioning)
    predictions: list[Tensor] = []
    # Photos in frames of their own take a pass of their own, in steps of squares too: ZeRO stage 3 gathers the weights
    # anew in every pass, so the passes of all steps and ranks must be the same.
    for rows in halves if training.frames else [joined(halves)]:
        z_t = schedule.add_noise(rows.x, rows.epsilon, rows.t).to(DTYPES[training.precision])
        predictions += engine(z_t, rows.t, rows.conditioning, rows.ids).split(len(halves[0].t))
    weights = [schedule.weight(half.t, training.min_snr_gamma) for half in halves]
    return prior_preservation_loss(predictions, targets, weights, prior_weight=training.prior_weight)


def train_worker(config: dict[str, Any]) -> None:
    """What one rank of the lane does: load the backbone, resume, train to the last step, checkpoint."""
    from pipelines.console import quiet_libraries
    from pipelines.zero import (
        Average,
        gradient_norm,
        overflowed,
        restore,
        restore_average,
        set_learning_rate,
        start_engine,
    )

    quiet_libraries()
    run: Run = config["run"]
    store = SubjectStore(config["store"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    if not torch.cuda.is_available():
        torch.set_num_threads(run.lane.cpus_per_worker)

    backbone = store.open_backbone(run.backbone)
    module = trainable(run, backbone)
    step = 0
    state: dict[str, Tensor] = {}
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            step, state = read_checkpoint(Path(folder))
        module.load_state_dict({name: state[f"param.{name}"] for name, _ in module.named_parameters()}, strict=False)
        if step == run.training.steps:
            return
    engine = start_engine(module, groups(module, run.training, backbone), run.training, run.lane)
    if isinstance(module, TextualInversion):
        module.place(engine.device, DTYPES[run.training.precision])
    average = Average(engine, run.training.ema_decay) if run.training.ema_decay else None
    if state:
        restore(engine, state, step)
        if average is not None:
            restore_average(engine, average, state)
        del state
    teacher = None
    if run.training.prior_kind == "teacher":
        teacher = Teacher(backbone, DTYPES[run.training.precision], engine.device)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "training_set.safetensors"
        path.write_bytes(training_set.location_of(store, run).read_bytes())
        batches = Batches(run, backbone, path)
        pending: list[Tensor] = []
        flushed = time.monotonic()
        micro_batch = run.training.batch // (world * run.training.gradient_accumulation)
        while step < run.training.steps:
            set_learning_rate(engine, _rate_factor(run.training, step))
            terms = torch.zeros(2, device=engine.device)
            for micro_step in range(run.training.gradient_accumulation):
                start = (micro_step * world + rank) * micro_batch
                rows = batches.rows(step, range(start, start + micro_batch))
                loss = step_loss(engine, run, backbone, rows, teacher)
                engine.backward(loss.total)
                engine.step()
                terms += torch.stack([loss.instance.detach(), _detached(loss.prior, engine.device)])
            if overflowed(engine):
                continue  # the same step again, so that every step updates the weights once
            terms /= run.training.gradient_accumulation
            pending.append(torch.cat([terms, gradient_norm(engine)[None]]))
            step += 1
            if average is not None:
                average.update(step)
            due = step % config["checkpoint_every"] == 0 or step == run.training.steps
            if due or len(pending) == _FLUSH_EVERY:
                measures = _measures(pending, step, run, time.monotonic() - flushed)
                pending, flushed = [], time.monotonic()
                if rank == 0:
                    config["log"].add.remote(step - len(measures) + 1, measures)
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
    store: SubjectStore, run: Run, checkpoint_every: int, display: Display, previews: bool = False
) -> Location:
    """Train a run to its last step, from its last checkpoint if it was killed; returns the final checkpoint.

    With `previews`, an actor of its own draws samples of each checkpoint if the cluster has room for it.
    """
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
    with display.stage("fine-tune", run.training.steps, "steps") as stage:
        artist = Previews(store, run, display) if previews else None
        with _watching(log, stage, folder, artist):
            result = trainer.fit()
    checkpoint = folder / "finetune" / Path(result.checkpoint.path).name
    marker.write_json({"checkpoint": f"finetune/{checkpoint.name}"})
    return checkpoint


@contextmanager
def _watching(log: Any, stage: Stage, folder: Location, previews: Previews | None) -> Iterator[None]:
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
        if previews is not None:
            previews.take(writer)

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
        if previews is not None:
            previews.close()
        writer.close()
        (folder / "tensorboard").upload(events)
        shutil.rmtree(events)
