"""Sampling images with diffusers' own pipelines, each image a function of its prompt, seed and settings alone."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import SchedulerMixin
from PIL import Image
from torch import Tensor

from dreambooth.backbones import Backbone
from dreambooth.backbones.precision import DTYPES


@dataclass(frozen=True)
class SamplerSettings:
    """How images are drawn. On a CPU, bytes are the same only for the same batch and threads, so both belong here.

    `scheduler` is the name of a diffusers scheduler class, or None for the backbone's own; `compile` runs the denoiser
    through torch.compile.
    """

    resolution: int
    steps: int
    guidance: float
    batch: int
    threads: int
    precision: str
    scheduler: str | None = None
    compile: bool = False

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
    replacements: Mapping[str, Any] | None = None,
) -> Any:
    """diffusers' pipeline on `device` with the scheduler and threads of `settings`.

    diffusers itself runs attention by fused kernels, and conditional and unconditional passes as one batch.
    """
    if device.type == "cpu":
        torch.set_num_threads(settings.threads)
    pipeline = backbone.pipeline(DTYPES[settings.precision], replacements)
    if settings.scheduler is not None:
        pipeline.scheduler = _exchanged(pipeline.scheduler, scheduler_class(settings.scheduler))
    pipeline.to(device)
    if device.type == "cuda":  # tensor cores read convolutions in this layout; CPUs gain nothing from it
        getattr(pipeline, backbone.denoiser).to(memory_format=torch.channels_last)
        for name in backbone.image_encoders:
            getattr(pipeline, name).to(memory_format=torch.channels_last)
    if settings.compile:
        getattr(pipeline, backbone.denoiser).compile()
    return pipeline


def _exchanged(scheduler: Any, kind: Any) -> Any:
    config = dict(scheduler.config)
    if kind is not type(scheduler) and str(config.get("variance_type")).startswith("learned"):
        config["variance_type"] = "fixed_small"  # of the few classes that know it, each has its own form of it
    return kind.from_config(config)


def sample(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: SamplerSettings,
    small: Sequence[Image.Image] = (),
    **options: Any,
) -> list[Image.Image]:
    """One RGB image a prompt, in batches of `settings.batch`; each image's noise comes from its own seed alone.

    Each distinct prompt is encoded once. A super-resolution pipeline enlarges the images `small`, one a prompt;
    `options` go to the pipeline. Raises ArithmeticError, naming the seeds, when pixels are not finite.
    """
    # An upscaler takes no size: its images are so many times as large as the small ones.
    sized = "height" in inspect.signature(pipeline.__call__).parameters
    size = {"height": settings.resolution, "width": settings.resolution} if sized else {}
    assert len(prompts) == len(seeds)
    assert len(small) in (0, len(prompts))
    encoded = {prompt: _encode(pipeline, prompt, settings) for prompt in dict.fromkeys(prompts)}
    images: list[Image.Image] = []
    for start in range(0, len(prompts), settings.batch):
        chosen = slice(start, start + settings.batch)
        texts = [encoded[prompt] for prompt in prompts[chosen]]
        output = pipeline(
            **{name: torch.cat([text[name] for text in texts]) for name in texts[0]},
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            **size,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[chosen]],
            output_type="np",
            **({"image": list(small[chosen])} if small else {}),
            **options,
        ).images
        broken = {
            seed: prompt
            for seed, prompt, pixels in zip(seeds[chosen], prompts[chosen], output, strict=True)
            if not np.isfinite(pixels).all()
        }
        if broken:
            named = ", ".join(f"{prompt!r} with seed {seed}" for seed, prompt in broken.items())
            raise ArithmeticError(f"pixels are not finite in the images of {named}: try precision fp32")
        images += pipeline.numpy_to_pil(output)
    return images


_EMBEDDINGS = (
    *("prompt_embeds", "negative_prompt_embeds"),
    *("pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
)
"""What diffusers' `encode_prompt` returns, in order, by the names under which the pipelines take it back."""


@torch.no_grad()
def _encode(pipeline: Any, prompt: str, settings: SamplerSettings) -> dict[str, Tensor]:
    encoded = pipeline.encode_prompt(
        prompt=prompt,
        device=pipeline.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=settings.guidance > 1,  # as in the pipelines themselves
    )
    return {name: value for name, value in zip(_EMBEDDINGS, encoded, strict=False) if value is not None}


def probe_batch(backbone: Backbone, settings: SamplerSettings, gpus: float) -> int:
    """The largest batch, a power of two, that a sampler with this share of a CUDA device draws and encodes.

    A tenth of the memory is left free. Raises ValueError when not even one image fits. Meant for a process of its own,
    which gives the device's memory back when it ends.
    """
    device = torch.device("cuda")
    torch.cuda.set_per_process_memory_fraction(0.9 * gpus)
    pipeline = load_pipeline(backbone, settings, device)

    def fits(batch: int) -> bool:
        try:
            images = sample(pipeline, ["a"] * batch, range(batch), replace(settings, batch=batch, steps=2))
            backbone.latents.encode(pipeline.components, to_pixels(images).to(device))
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()
        return True

    return largest_power(fits)


def largest_power(fits: Callable[[int], bool], limit: int = 64) -> int:
    """The largest power of two up to `limit` that fits, found by doubling; ValueError when 1 does not."""
    if not fits(1):
        raise ValueError("not even one image fits on the device: lower --resolution, or use a larger device")
    batch = 1
    while batch < limit and fits(2 * batch):
        batch *= 2
    return batch


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """RGB images of one size as a float32 tensor (B, 3, H, W) in [-1, 1]."""
    stacked = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1
