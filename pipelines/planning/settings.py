"""From options to settings: each default is resolved here, by the backbone's preset, the machine's, or the method."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import torch

from dreambooth.backbones import Backbone, LowResolution
from dreambooth.backbones.presets import MachinePreset
from dreambooth.methods import find_method
from dreambooth.methods.base import parse_settings
from dreambooth.runs import Training, WorkerGroup
from dreambooth.sampling.sampler import SamplerSettings, probe_batch
from dreambooth.subjects.crops import Size, bucket_sizes, view_count
from pipelines.planning.options import Options
from pipelines.planning.workers import gpus_per_worker


def training_settings(options: Options, backbone: Backbone, low_resolution: LowResolution | None = None) -> Training:
    """The settings of a stage. Ruiz et al. tune super-resolution on the subject's photos alone, without a prior."""
    preset, machine, chosen = backbone.preset, machine_preset(options, backbone), options.training
    method, with_text = find_method(chosen.method), options.model.train_text_encoder
    resolution = backbone.default_resolution
    if low_resolution is None and options.model.resolution is not None:
        resolution = options.model.resolution
    prior_weight = options.prior.prior_weight if low_resolution is None and method.preserves_prior else 0.0
    backbone.latents.check_side(resolution)
    on_gpu = gpus_per_worker(options) > 0
    defaults = method.defaults(backbone, machine, with_text=with_text)
    steps, rate = chosen.steps or defaults.steps, chosen.learning_rate or defaults.learning_rate
    if chosen.warmup_steps >= steps:
        raise ValueError(f"--warmup-steps {chosen.warmup_steps} leaves nothing of {steps} steps: use fewer")
    return Training(
        method=chosen.method,
        trained=method.trained(backbone, with_text=with_text),
        resolution=resolution,
        steps=steps,
        learning_rate=rate,
        text_encoder_learning_rate=(chosen.text_encoder_learning_rate or rate) if with_text else 0.0,
        schedule=chosen.schedule,
        warmup_steps=chosen.warmup_steps,
        batch=chosen.batch or (machine or preset).batch,
        gradient_accumulation=chosen.gradient_accumulation,
        prior_weight=prior_weight,
        prior_images=(options.prior.prior_images or preset.prior_images) if prior_weight else 0,
        min_snr_gamma=chosen.min_snr_gamma,
        offset_noise=chosen.offset_noise,
        ema_decay=chosen.ema_decay,
        weight_decay=chosen.weight_decay,
        max_grad_norm=chosen.max_grad_norm,
        optimizer=chosen.optimizer,
        precision=chosen.precision or (machine.precision if machine else "bf16" if on_gpu else "fp32"),
        gradient_checkpointing=chosen.gradient_checkpointing or bool(machine and machine.gradient_checkpointing),
        low_resolution=low_resolution,
        flip=chosen.flip,
        random_crop=chosen.random_crop,
        views=view_count(chosen.flip, chosen.random_crop),
        frames=_buckets(backbone, resolution) if chosen.buckets else (),
        prior_kind=options.prior.prior_kind,
        compile=chosen.compile,
        bare_identifier=options.subject.bare_identifier,
        method_settings=parse_settings(method, chosen.method_settings),
    )


def machine_preset(options: Options, backbone: Backbone) -> MachinePreset | None:
    """The preset of the machine that the options name."""
    return backbone.machine_preset(options.cluster.preset) if options.cluster.preset else None


def _buckets(backbone: Backbone, resolution: int) -> tuple[Size, ...]:
    multiple = backbone.latents.side_multiple
    buckets = bucket_sizes(resolution, multiple)
    if len(buckets) == 1:
        raise ValueError(
            f"--buckets: {backbone.source!r} takes sides that are multiples of {multiple}, and at a resolution of "
            f"{resolution} only the square has such: raise --resolution, or leave --buckets out"
        )
    return tuple(buckets)


def drawing(options: Options, backbone: Backbone) -> dict[str, Any]:
    """How samples of the finished model are drawn: steps and guidance."""
    preset, chosen = backbone.preset, options.samples
    return {
        "steps": chosen.sample_steps or preset.sampler_steps,
        "guidance": _or(chosen.sample_guidance, preset.guidance),
    }


def prior_sampler(options: Options, backbone: Backbone, training: Training, lane: WorkerGroup) -> SamplerSettings:
    """How class-prior images are drawn; `--prior-batch auto` probes this machine's GPU."""
    chosen, preset = options.prior, backbone.preset
    settings = SamplerSettings(
        resolution=training.resolution,
        steps=chosen.prior_steps or preset.sampler_steps,
        guidance=_or(chosen.prior_guidance, preset.guidance),
        batch=1 if chosen.prior_batch == "auto" else chosen.prior_batch,
        threads=lane.cpus_per_worker,
        precision=training.precision,
        scheduler=chosen.prior_scheduler or preset.prior_scheduler,
        compile=chosen.prior_compile,
    )
    if chosen.prior_batch != "auto":
        return settings
    if not (lane.gpus_per_worker and torch.cuda.is_available()):
        raise ValueError("--prior-batch auto probes a GPU, and this machine has none to give: give a number")
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return replace(settings, batch=pool.submit(probe_batch, backbone, settings, lane.gpus_per_worker).result())


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
