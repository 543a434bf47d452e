"""Sampling images with diffusers' own pipelines, each image a function of its prompt, seed and settings alone."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import SchedulerMixin
from PIL import Image
from torch import Tensor, nn

from dreambooth.backbones import Backbone

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class SamplerSettings:
    """How images are drawn. On a CPU, bytes are the same only for the same batch and threads, so both belong here.

    `scheduler` is the name of a diffusers scheduler class, or None for the backbone's own.
    """

    resolution: int
    steps: int
    guidance: float
    batch: int
    threads: int
    precision: str
    scheduler: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """A JSON-like form, for hashing and for records."""
        return asdict(self)


def scheduler_class(name: str) -> Any:
    """The diffusers scheduler of this class name; ValueError, naming the nearest, when there is none."""
    named = {key: getattr(diffusers, key) for key in dir(diffusers) if key.endswith("Scheduler")}
    # Where a scheduler's own dependency is absent, diffusers has a stand-in of that name.
    known = [key for key, value in named.items() if inspect.isclass(value) and issubclass(value, SchedulerMixin)]
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ValueError(f"{name!r} is no diffusers scheduler; the nearest name is {nearest!r}")
    return named[name]


def load_pipeline(
    backbone: Backbone,
    settings: SamplerSettings,
    device: torch.device,
    replacements: Mapping[str, nn.Module] | None = None,
) -> Any:
    """diffusers' pipeline on `device` with the scheduler and threads of `settings`."""
    if device.type == "cpu":
        torch.set_num_threads(settings.threads)
    pipeline = backbone.pipeline(DTYPES[settings.precision], replacements)
    if settings.scheduler is not None:
        pipeline.scheduler = scheduler_class(settings.scheduler).from_config(pipeline.scheduler.config)
    return pipeline.to(device)


def sample(pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], settings: SamplerSettings) -> list[Image.Image]:
    """One RGB image a prompt, in batches of `settings.batch`; each image's noise comes from its own seed alone."""
    assert len(prompts) == len(seeds)
    images: list[Image.Image] = []
    for start in range(0, len(prompts), settings.batch):
        chosen = slice(start, start + settings.batch)
        output = pipeline(
            prompt=list(prompts[chosen]),
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            height=settings.resolution,
            width=settings.resolution,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[chosen]],
            output_type="np",
        ).images
        if not np.isfinite(output).all():
            raise ArithmeticError(f"sampling {prompts[chosen]} gave pixels that are not finite: try precision fp32")
        images += pipeline.image_processor.numpy_to_pil(output)
    return images


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """RGB images of one size as a float32 tensor (B, 3, H, W) in [-1, 1]."""
    stacked = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1
