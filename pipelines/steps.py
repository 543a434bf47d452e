"""One optimizer step: the module that is trained, the loss of its rows, what is seen of it. Knows nothing of Ray."""

from __future__ import annotations

import math
import resource
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dreambooth.backbones import Backbone, Conditioning
from dreambooth.diffusion import PriorPreservationLoss, prior_preservation_loss
from dreambooth.learning_rate import learning_rate_factor
from dreambooth.memory import in_precision
from dreambooth.sampling import DTYPES
from dreambooth.teacher import Teacher
from pipelines.batches import Half, joined
from pipelines.prefetch import Rows
from pipelines.run import Run, Training


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


def micro_batches(run: Run, rank: int, world: int) -> list[tuple[range, float]]:
    """The global samples of each pass that a rank makes in a step, and how much the pass counts for.

    The batch lies in the micro-batches of the lane as it was planned. Fewer workers take several each; where these do
    not come out even, some take one for nothing.
    """
    count = run.lane.workers * run.training.gradient_accumulation
    rows, passes = run.training.batch // count, math.ceil(count / world)
    found = []
    for number in range(rank, passes * world, world):
        start = min(number, count - 1) * rows
        # The engine takes the mean over all passes of all workers, of which `count` are to count.
        found.append((range(start, start + rows), passes * world / count if number < count else 0.0))
    return found


def train_step(
    engine: Any, run: Run, backbone: Backbone, batches: Rows, step: int, teacher: Teacher | None = None
) -> Tensor | None:
    """Do update `step`, counted from 0, of this rank: instance term, prior term and gradient norm (3,), or None.

    None says that the gradients overflowed fp16: nothing was updated, and the step is to be done again.
    """
    from pipelines.zero import gradient_norm, overflowed, set_learning_rate

    passes = micro_batches(run, dist.get_rank(), dist.get_world_size())
    set_learning_rate(engine, rate_factor(run.training, step))
    terms = torch.zeros(2, device=engine.device)
    for samples, share in passes:
        loss = step_loss(engine, run, backbone, batches.rows(step, samples), teacher)
        engine.backward(share * loss.total)
        engine.step()
        terms += share * torch.stack([loss.instance.detach(), _detached(loss.prior, engine.device)])
    if overflowed(engine):
        return None
    return torch.cat([terms / len(passes), gradient_norm(engine)[None]])


def _detached(term: Tensor | None, device: torch.device) -> Tensor:
    return torch.zeros((), device=device) if term is None else term.detach()


def rate_factor(training: Training, step: int) -> float:
    """What the learning rates of update `step`, counted from 0, are multiplied by."""
    return learning_rate_factor(step, training.steps, training.warmup_steps, training.schedule)


def measures_of(pending: list[Tensor], step: int, run: Run, seconds: float) -> list[dict[str, float]]:
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
        rate = run.training.learning_rate * rate_factor(run.training, number - 1)
        measures = {"loss/instance": instance, "loss/prior": prior, "learning_rate": rate, **speed}
        rows.append(measures | ({} if math.isnan(norm) else {"gradient_norm": norm}))
    return rows


def _peak_memory() -> int:
    """Bytes: the device's peak so far, or on the CPU this process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
