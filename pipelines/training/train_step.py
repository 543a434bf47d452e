"""One training step, from rows to update. Knows nothing of Ray.

Symbols are the paper's (Ruiz et al., section 3.1 and 3.3). The rows of a step are two minibatches: instance images
with their prompts c, and class-prior images, x_pr, with theirs, c_pr. Of each row, x, epsilon and t are drawn already
(`batches`); the loss is Eq. 2 in the space in which the backbone's network answers (`dreambooth.objectives`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dreambooth.backbones import Backbone
from dreambooth.backbones.precision import DTYPES
from dreambooth.common.learning_rate import learning_rate_factor
from dreambooth.methods.teacher import Teacher
from dreambooth.objectives.losses import PriorPreservationLoss, prior_preservation_loss
from dreambooth.runs import RunSpec, Training
from pipelines.training.batches import Minibatch, joined
from pipelines.training.prefetch import Rows


def train_step(
    engine: Any, run: RunSpec, backbone: Backbone, batches: Rows, step: int, teacher: Teacher | None = None
) -> Tensor | None:
    """Do update `step`, counted from 0, of this rank: instance term, prior term and gradient norm (3,), or None.

    None says that the gradients overflowed fp16: nothing was updated, and the step is to be done again.
    """
    from pipelines.engine.engine import gradient_norm, overflowed, set_learning_rate

    passes = passes_of(run, dist.get_rank(), dist.get_world_size())
    set_learning_rate(engine, rate_factor(run.training, step))
    terms = torch.zeros(2, device=engine.device)
    for samples, share in passes:
        loss = step_loss(engine, run, backbone, batches.rows(step, samples), teacher)
        engine.backward(share * loss.total)
        engine.step()  # clips, reduces over the ranks and updates, in the step's last pass
        terms += share * torch.stack([loss.instance.detach(), _detached(loss.prior, engine.device)])
    if overflowed(engine):
        return None
    return torch.cat([terms / len(passes), gradient_norm(engine)[None]])


def step_loss(
    engine: Any, run: RunSpec, backbone: Backbone, minibatches: Sequence[Minibatch], teacher: Teacher | None = None
) -> PriorPreservationLoss:
    """Eq. 2 of one pass; a teacher's prediction takes the place of the class-prior images as the target."""
    objective, training = backbone.objective, run.training
    minibatches = [rows.to(engine.device) for rows in minibatches]
    targets = [objective.target(rows.x, rows.epsilon, rows.t) for rows in minibatches]
    if teacher is not None:
        # Ahead of the engine, so that its activations are gone before those are there that the backward pass needs.
        prior = minibatches[1]
        targets[1] = teacher(objective.add_noise(prior.x, prior.epsilon, prior.t), prior.t, prior.conditioning)
    predictions: list[Tensor] = []
    # Photos in buckets of their own take a pass of their own, in steps of squares too: ZeRO stage 3 gathers the weights
    # anew in every pass, so the passes of all steps and ranks must be the same.
    for rows in minibatches if training.frames else [joined(minibatches)]:
        z_t = objective.add_noise(rows.x, rows.epsilon, rows.t).to(DTYPES[training.precision])
        predictions += engine(z_t, rows.t, rows.conditioning, rows.ids).split(len(minibatches[0].t))
    weights = [objective.weight(rows.t, training.min_snr_gamma) for rows in minibatches]
    return prior_preservation_loss(predictions, targets, weights, prior_weight=training.prior_weight)


def rate_factor(training: Training, step: int) -> float:
    """What the learning rates of update `step`, counted from 0, are multiplied by."""
    return learning_rate_factor(step, training.steps, training.warmup_steps, training.schedule)


def passes_of(run: RunSpec, rank: int, world: int) -> list[tuple[range, float]]:
    """The passes that a rank makes in a step: the global samples of each, and how much it counts for.

    The batch is divided as it was planned for all of a lane's workers. Fewer workers make several passes each; where
    these do not come out even, some count for nothing.
    """
    count = run.lane.workers * run.training.gradient_accumulation
    rows, passes = run.training.batch // count, math.ceil(count / world)
    found = []
    for number in range(rank, passes * world, world):
        start = min(number, count - 1) * rows
        # The engine takes the mean over all passes of all workers, of which `count` are to count.
        found.append((range(start, start + rows), passes * world / count if number < count else 0.0))
    return found


def _detached(term: Tensor | None, device: torch.device) -> Tensor:
    return torch.zeros((), device=device) if term is None else term.detach()
