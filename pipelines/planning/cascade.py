"""Stage III of a cascade: its samples, enlarged once more by a model that is not trained, and that is not published."""

from __future__ import annotations

from dataclasses import replace

from dreambooth.backbones import Upscaler, open_backbone
from dreambooth.runs import PlannedSubject, Upscaling
from pipelines.planning.options import Options


def open_upscaler(options: Options) -> Upscaler | None:
    """The upscaler that `options` ask for; raises ValueError when it is none, or has no cascade to end."""
    if options.model.upscaler is None:
        return None
    if options.model.super_resolution is None:
        raise ValueError("--upscaler enlarges what --super-resolution has enlarged: give both, or leave it out")
    upscaler = open_backbone(options.model.upscaler)
    if not isinstance(upscaler, Upscaler):
        raise ValueError(
            f"--upscaler {upscaler.source!r} ({upscaler.family}) is no upscaler: give "
            "stabilityai/stable-diffusion-x4-upscaler, or a folder of its kind"
        )
    return upscaler


def with_upscaling(planned: PlannedSubject, options: Options, upscaler: Upscaler | None) -> PlannedSubject:
    """Let the upscaler, if there is one, end the cascade of the subject's run."""
    if upscaler is None:
        return planned
    before, chosen = planned.run.stages[-1].samples, options.samples
    samples = replace(
        before,
        resolution=before.resolution * upscaler.factor,
        steps=chosen.sample_steps or upscaler.sampler_steps,
        guidance=upscaler.guidance if chosen.sample_guidance is None else chosen.sample_guidance,
    )
    upscaling = Upscaling(upscaler.hash, samples, upscaler.noise_level)
    return replace(planned, run=replace(planned.run, upscaling=upscaling))
