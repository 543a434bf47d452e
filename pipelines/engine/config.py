"""DeepSpeed settings of the user's own: a JSON file in its own form, merged over the system's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_OWNED = {
    "train_batch_size": "--batch",
    "train_micro_batch_size_per_gpu": "--batch, --workers and --gradient-accumulation",
    "gradient_accumulation_steps": "--gradient-accumulation",
    "gradient_clipping": "--max-grad-norm",
    "optimizer": "--optimizer, --learning-rate and --weight-decay",
    "scheduler": "--schedule and --warmup-steps",
    **dict.fromkeys(("bf16", "bfloat16", "fp16", "amp", "torch_autocast", "data_types"), "--precision"),
    "zero_optimization.offload_optimizer.device": "--offload",
    "zero_optimization.offload_optimizer.nvme_path": "--nvme-path",
    "zero_optimization.offload_param.device": "--offload",
    "zero_optimization.offload_param.nvme_path": "--nvme-path",
    **dict.fromkeys(("zero_optimization.cpu_offload", "zero_optimization.cpu_offload_param"), "--offload"),
}
"""Settings that follow from an option, on which the plan, the run's key and the checkpoints rest."""


def read_deepspeed_config(path: str, zero_stage: int) -> dict[str, Any]:
    """The settings of a file; ValueError names one that belongs to an option, or that DeepSpeed does not take."""
    try:
        settings = json.loads(Path(path).expanduser().read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--deepspeed {path}: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"--deepspeed {path}: expected an object of settings, found {type(settings).__name__}")
    for name in _names(settings):
        if name in _OWNED:
            raise ValueError(f"--deepspeed {path}: {name} is set by {_OWNED[name]}: leave it out of the file")
    zero = settings.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ValueError(f"--deepspeed {path}: zero_optimization must be an object, not {zero!r}")
    if zero.get("stage", zero_stage) != zero_stage:
        raise ValueError(
            f"--deepspeed {path}: zero_optimization.stage {zero['stage']} is not --zero-stage {zero_stage}: give one"
        )
    _check_zero(path, zero)
    return settings


def merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """`theirs` over `ours`, objects inside them likewise."""
    both = dict(ours)
    for name, value in theirs.items():
        inside = both.get(name)
        both[name] = merged(inside, value) if isinstance(inside, dict) and isinstance(value, dict) else value
    return both


def _names(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names of all settings, objects and what is in them."""
    for name, value in settings.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from _names(value, f"{prefix}{name}.")


def _check_zero(path: str, zero: dict[str, Any]) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        [first, *_] = error.errors()
        name = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise ValueError(f"--deepspeed {path}: {name}: {first['msg']}") from error
