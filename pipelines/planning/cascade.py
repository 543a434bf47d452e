"""The later stages of a cascade: super-resolution, which is trained too, and an upscaler, which stays as it is."""

from __future__ import annotations

from dataclasses import replace

from dreambooth.backbones import (
    Backbone,
    DeepFloydIF,
    DeepFloydIFSuperResolution,
    LowResolution,
    Upscaler,
    open_backbone,
)
from dreambooth.runs import PlannedSubject, Training, Upscaling
from pipelines.planning.options import Options
from pipelines.planning.settings import drawing, training_settings


def super_resolution(options: Options, backbone: Backbone, training: Training) -> tuple[Backbone, Training]:
    """The backbone that enlarges the images of `backbone`, which `training` makes, and its own training."""
    second = open_backbone(options.model.super_resolution or "")
    if not (isinstance(backbone, DeepFloydIF) and isinstance(second, DeepFloydIFSuperResolution)):
        raise ValueError(
            f"--super-resolution {second.source!r} ({second.family}) does not enlarge images of {backbone.source!r} "
            f"({backbone.family}): give stage II of DeepFloyd IF beside its stage I"
        )
    if second.default_resolution <= training.resolution:
        raise ValueError(
            f"--super-resolution {second.source!r} draws {second.default_resolution} pixels a side, which does not "
            f"enlarge --resolution {training.resolution}"
        )
    level = second.default_noise_level if options.model.noise_level is None else options.model.noise_level
    if level >= second.augmentation.steps:
        raise ValueError(f"--noise-level must be below {second.augmentation.steps}, not {level}")
    return second, training_settings(options, second, LowResolution(training.resolution, level))


def with_super_resolution(
    planned: PlannedSubject, options: Options, *second: tuple[Backbone, Training]
) -> PlannedSubject:
    """Add the second stage, if there is one, to the subject's run."""
    run = planned.run
    for backbone, training in second:
        samples = replace(run.samples, resolution=training.resolution, **drawing(options, backbone))
        enlarged = replace(run, backbone=backbone.hash, training=training, prior=None, samples=samples)
        run = replace(run, super_resolution=enlarged)
    return replace(planned, run=run)


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
    before, chosen = planned.run.cascade[-1].samples, options.samples
    samples = replace(
        before,
        resolution=before.resolution * upscaler.factor,
        steps=chosen.sample_steps or upscaler.sampler_steps,
        guidance=upscaler.guidance if chosen.sample_guidance is None else chosen.sample_guidance,
    )
    upscaling = Upscaling(upscaler.hash, samples, upscaler.noise_level)
    return replace(planned, run=replace(planned.run, upscaling=upscaling))
