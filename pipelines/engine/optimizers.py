"""The optimizers by name, and what of their state a checkpoint holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Adafactor

from dreambooth.runs import Training, WorkerGroup

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter, besides the step."""
STATES = (*MOMENTS, "exp_avg_sq_row", "exp_avg_sq_col", "state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2")
"""That of all optimizers: Adafactor's second moment by rows and columns, and 8-bit moments with their scales."""


def make_optimizer(groups: Sequence[dict[str, Any]], training: Training, lane: WorkerGroup) -> torch.optim.Optimizer:
    """The optimizer of the run over `groups` of parameters.

    Adafactor takes the learning rate as it is, as AdamW does, and not as a fraction of each weight's size, which is its
    default: the rates that people publish for fine-tuning are of this kind.
    """
    rate, decay = training.learning_rate, training.weight_decay
    if training.optimizer == "adafactor":
        return Adafactor(list(groups), lr=rate, weight_decay=decay, scale_parameter=False, relative_step=False)
    if training.optimizer == "adamw-8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(list(groups), lr=rate, weight_decay=decay)
    return torch.optim.AdamW(list(groups), lr=rate, weight_decay=decay, fused=lane.offload == "none")


def state_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """What the optimizer keeps of a parameter, besides the step, by name."""
    return {name: value for name, value in optimizer.state[parameter].items() if name in STATES}


def set_state(optimizer: torch.optim.Optimizer, parameter: Tensor, state: dict[str, Tensor], step: int) -> None:
    """Set what `state_of` gave, and the steps done."""
    counted = torch.tensor(float(step), device=parameter.device) if isinstance(optimizer, torch.optim.AdamW) else step
    kept = {name: value.to(parameter.device) for name, value in state.items()}
    optimizer.state[parameter] = {"step": counted, **kept}
