"""Objectives: what a network learns of noisy images, and the loss of DreamBooth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dreambooth.objectives.base import Objective
from dreambooth.objectives.variance_preserving import VariancePreserving

OBJECTIVES: list[type[Objective]] = [VariancePreserving]
"""Those that are known. A new one is a file of its own and a line here."""

__all__ = ["OBJECTIVES", "Objective", "VariancePreserving", "read_objective"]


def read_objective(scheduler: Mapping[str, Any]) -> Objective:
    """The objective of a diffusers scheduler's configuration; ValueError when none is known or it is not trainable."""
    for kind in OBJECTIVES:
        if (objective := kind.from_scheduler(scheduler)) is not None:
            return objective
    known = ", ".join(kind.__name__ for kind in OBJECTIVES)
    raise ValueError(f"{scheduler.get('_class_name')} fits no objective that is known here ({known})")
