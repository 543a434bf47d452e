"""What is seen of training: losses, gradient norm, learning rate, speed and memory of each step."""

from __future__ import annotations

import math
import resource

import torch
import torch.distributed as dist
from torch import Tensor

from dreambooth.runs import RunSpec
from pipelines.training.train_step import rate_factor


def measures_of(pending: list[Tensor], step: int, run: RunSpec, seconds: float) -> list[dict[str, float]]:
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
