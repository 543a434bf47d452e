"""Checks of options that need no file: numbers out of range, and options that exclude each other."""

from __future__ import annotations

from dreambooth.methods import find_method
from dreambooth.sampling.sampler import scheduler_class
from pipelines.planning.options import Options

_POSITIVE = (
    *("resolution", "prior_images", "prior_steps", "prior_workers", "steps", "learning_rate", "batch"),
    *("text_encoder_learning_rate", "gradient_accumulation", "min_snr_gamma", "checkpoint_every", "workers"),
    *("min_workers", "lanes", "cpus_per_worker", "device_memory", "sample_steps"),
)
_NOT_NEGATIVE = (
    *("prior_weight", "weight_decay", "max_grad_norm", "gpus_per_worker", "warmup_steps", "offset_noise", "ema_decay"),
    *("prior_guidance", "sample_guidance", "seed", "noise_level"),
)


def check_options(options: Options) -> None:
    """Raise ValueError, naming the option, for a number out of range or options that exclude each other."""
    values = options.as_dict()
    for name in _POSITIVE:
        if values[name] is not None and not values[name] > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {values[name]}")
    for name in _NOT_NEGATIVE:
        if values[name] is not None and not values[name] >= 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be below 0, not {values[name]}")
    if values["ema_decay"] >= 1:
        raise ValueError(f"--ema-decay must be below 1, not {values['ema_decay']}")
    if values["text_encoder_learning_rate"] and not options.model.train_text_encoder:
        raise ValueError("--text-encoder-learning-rate needs --train-text-encoder")
    if options.prior.prior_batch != "auto" and not options.prior.prior_batch > 0:
        raise ValueError(f'--prior-batch must be above 0 or "auto", not {options.prior.prior_batch}')
    if options.prior.prior_scheduler is not None:
        scheduler_class(options.prior.prior_scheduler)
    find_method(options.training.method).check(
        train_text_encoder=options.model.train_text_encoder,
        super_resolution=options.model.super_resolution is not None,
    )
    if options.model.noise_level is not None and options.model.super_resolution is None:
        raise ValueError("--noise-level is noise on the small image of super-resolution: give --super-resolution too")
    if options.prior.prior_kind == "teacher":
        _check_teacher(options)
    if options.training.buckets and options.model.super_resolution is not None:
        raise ValueError("--buckets leaves photos unsquare, and --super-resolution enlarges squares: leave one out")
    if options.training.buckets and options.training.compile:
        raise ValueError("--buckets trains in many shapes, and --compile compiles for one: leave one out")
    if (values["gpus_per_worker"] or 0) > 1:
        raise ValueError("--gpus-per-worker must be at most 1: a worker drives one device, so raise --workers instead")


def _check_teacher(options: Options) -> None:
    for given, name in (
        (not options.prior.prior_weight, "--prior-weight 0"),
        (options.model.super_resolution, "--super-resolution"),
        (not find_method(options.training.method).preserves_prior, f"--method {options.training.method}"),
    ):
        if given:
            raise ValueError(f"--prior-kind teacher needs a prior term, and {name} trains without one: leave one out")
