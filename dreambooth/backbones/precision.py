"""The precisions in which networks work, by name."""

from __future__ import annotations

import torch

from dreambooth.backbones.text import Conditioning

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def in_precision(conditioning: Conditioning, dtype: torch.dtype) -> Conditioning:
    """The conditioning in the type of the weights; what is counted, as positions in time are, stays exact."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in conditioning.items()}
