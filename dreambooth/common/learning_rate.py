"""The learning rate over the optimizer steps: a pure function, so that a resumed run needs no state for it."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "cosine", "linear"]


def learning_rate_factor(step: int, steps: int, warmup_steps: int, schedule: Schedule) -> float:
    """What the learning rate of update `step` (0 ... steps - 1) is multiplied with: a linear rise, then the schedule.

    The rise and the fall leave out the value 0 itself, which would waste an update.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    left = 1 - (step - warmup_steps) / (steps - warmup_steps)
    if schedule == "cosine":
        return 0.5 * (1 - math.cos(math.pi * left))
    return left if schedule == "linear" else 1.0
