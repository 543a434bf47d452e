"""From options to a plan: everything is checked and resolved here, before Ray starts."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import torch

from dreambooth.backbones import (
    Backbone,
    DeepFloydIF,
    DeepFloydIFSuperResolution,
    LowResolution,
    Upscaler,
    open_backbone,
)
from dreambooth.backbones.presets import MachinePreset, machine_preset, preset_of
from dreambooth.memory import MemoryPlan
from dreambooth.runs import PlannedSubject, RunSpec, Training, WorkerGroup, subject_phrase
from dreambooth.sampling.prior_set import PriorSet
from dreambooth.sampling.sampler import SamplerSettings, probe_batch
from dreambooth.store import SubjectStore
from dreambooth.subjects.crops import Size, bucket_frames, view_count
from dreambooth.subjects.manifest import SubjectSpec
from dreambooth.subjects.prompts import class_prompt, default_samples, fill
from pipelines.planning.cascade import open_upscaler, with_upscaling
from pipelines.planning.options import Options
from pipelines.planning.preflight import Preflight
from pipelines.planning.subjects import identifier_of, photo_prompts, read_subject, subject_specs
from pipelines.planning.validation import check_options
from pipelines.planning.workers import GIB, check_engine, check_nvme_path, device_bytes, gpus_per_worker, make_lane


@dataclass(frozen=True)
class Plan:
    """What the job will do."""

    options: Options
    store: SubjectStore
    backbones: tuple[Backbone, ...]
    """The backbone, and the one that enlarges its images when a cascade is trained."""
    subjects: tuple[PlannedSubject, ...]
    failures: dict[str, str]
    """Subjects of a manifest that cannot be personalized, with the reason."""
    order: tuple[str, ...]
    """All subjects by name, as they were given."""
    lane: WorkerGroup
    preflight: Preflight
    upscaler: Upscaler | None = None

    @property
    def stored(self) -> tuple[Backbone, ...]:
        """All that the store must hold."""
        return (*self.backbones, *([self.upscaler] if self.upscaler else []))

    @property
    def backbone(self) -> Backbone:
        """The backbone that draws from text."""
        return self.backbones[0]

    @property
    def memory(self) -> tuple[MemoryPlan, ...]:
        """Of each backbone; they are trained one after another."""
        return self.preflight.memory

    def missing_priors(self) -> dict[str, tuple[int, int]]:
        """For each class prompt, the prior images wanted and those already in the store."""
        counts = {}
        for planned in self.subjects:
            prior, wanted = planned.run.prior, planned.run.training.prior_images
            if prior is not None:
                present = len(prior.present(self.store.root) & set(prior.shards(wanted)))
                counts[prior.prompt] = (wanted, min(wanted, present * prior.sampler.batch))
        return counts


def make_plan(options: Options) -> Plan:
    """Check every option and input and resolve all defaults; raises ValueError naming what is wrong.

    In a manifest, a subject that cannot be read becomes a failure of its own and leaves the others alone.
    """
    check_options(options)
    backbone = open_backbone(options.model.backbone)
    if isinstance(backbone, DeepFloydIFSuperResolution | Upscaler):
        option = "--upscaler" if isinstance(backbone, Upscaler) else "--super-resolution"
        raise ValueError(
            f"--backbone {backbone.source!r} enlarges images and draws none: give stage I of its cascade, and this one "
            f"as {option}"
        )
    training = _training(options, backbone)
    stages = [(backbone, training)]
    if options.model.super_resolution is not None:
        stages.append(_super_resolution(options, backbone, training))
    upscaler = open_upscaler(options)
    lane = make_lane(options, _machine_preset(options, backbone))
    check_nvme_path(options, lane)
    for stage in stages:
        check_engine(*stage, lane)
    preflight = Preflight(stages, lane, device_bytes(options, lane))
    store = SubjectStore(options.run.store)
    specs = subject_specs(options)
    prior_sampler = _prior_sampler(options, backbone, training, lane) if training.prior_images else None
    subjects, failures = [], {}
    taken: set[str] = set()
    for spec in specs:
        try:
            planned = _plan_subject(options, spec, backbone, store, training, lane, prior_sampler, taken)
        except ValueError as error:
            if options.subject.manifest is None:
                raise
            failures[spec.name] = str(error)
        else:
            taken.add(planned.run.identifier)
            subjects.append(with_upscaling(_with_super_resolution(planned, options, *stages[1:]), options, upscaler))
    order = tuple(spec.name for spec in specs)
    backbones = tuple(backbone for backbone, _ in stages)
    plan = Plan(options, store, backbones, tuple(subjects), failures, order, lane, preflight, upscaler)
    _check_disk(plan)
    if not options.run.dry_run:
        store.check_writable()
    return plan


def _training(options: Options, backbone: Backbone, low_resolution: LowResolution | None = None) -> Training:
    """The settings of a stage. Ruiz et al. tune super-resolution on the subject's photos alone, without a prior."""
    preset, machine, chosen = preset_of(backbone), _machine_preset(options, backbone), options.training
    with_text = options.model.train_text_encoder
    resolution = backbone.default_resolution
    if low_resolution is None and options.model.resolution is not None:
        resolution = options.model.resolution
    inversion = chosen.method == "textual-inversion"
    prior_weight = options.prior.prior_weight if low_resolution is None and not inversion else 0.0
    backbone.check_resolution(resolution)
    on_gpu = gpus_per_worker(options) > 0
    default_rate = (machine or preset).learning_rate
    steps, rate = (machine or preset).steps, preset.learning_rate_with_text_encoder if with_text else default_rate
    if inversion:
        steps, rate = preset.inversion_steps, preset.inversion_learning_rate
    steps, rate = chosen.steps or steps, chosen.learning_rate or rate
    if chosen.warmup_steps >= steps:
        raise ValueError(f"--warmup-steps {chosen.warmup_steps} leaves nothing of {steps} steps: use fewer")
    return Training(
        method=chosen.method,
        trained=() if inversion else (backbone.denoiser, *(backbone.text_encoders if with_text else ())),
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
        frames=_frames(backbone, resolution) if chosen.buckets else (),
        prior_kind=options.prior.prior_kind,
        compile=chosen.compile,
        bare_identifier=options.subject.bare_identifier,
    )


def _machine_preset(options: Options, backbone: Backbone) -> MachinePreset | None:
    return machine_preset(backbone, options.cluster.preset) if options.cluster.preset else None


def _frames(backbone: Backbone, resolution: int) -> tuple[Size, ...]:
    frames = bucket_frames(resolution, backbone.side_multiple)
    if len(frames) == 1:
        raise ValueError(
            f"--buckets: {backbone.source!r} takes sides that are multiples of {backbone.side_multiple}, and at a "
            f"resolution of {resolution} only the square has such: raise --resolution, or leave --buckets out"
        )
    return tuple(frames)


def _super_resolution(options: Options, backbone: Backbone, training: Training) -> tuple[Backbone, Training]:
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
    return second, _training(options, second, LowResolution(training.resolution, level))


def _with_super_resolution(
    planned: PlannedSubject, options: Options, *second: tuple[Backbone, Training]
) -> PlannedSubject:
    """Add the second stage, if there is one, to the subject's run."""
    run = planned.run
    for backbone, training in second:
        samples = replace(run.samples, resolution=training.resolution, **_drawing(options, backbone))
        enlarged = replace(run, backbone=backbone.hash, training=training, prior=None, samples=samples)
        run = replace(run, super_resolution=enlarged)
    return replace(planned, run=run)


def _drawing(options: Options, backbone: Backbone) -> dict[str, Any]:
    preset, chosen = preset_of(backbone), options.samples
    return {
        "steps": chosen.sample_steps or preset.sampler_steps,
        "guidance": _or(chosen.sample_guidance, preset.guidance),
    }


def _plan_subject(
    options: Options,
    spec: SubjectSpec,
    backbone: Backbone,
    store: SubjectStore,
    training: Training,
    lane: WorkerGroup,
    prior_sampler: SamplerSettings | None,
    taken: set[str],
) -> PlannedSubject:
    subject, found_noun = read_subject(options, spec)
    identifier = identifier_of(options, spec, backbone, store, taken)
    sampling: dict[str, Any] = {
        "resolution": training.resolution,
        "threads": lane.cpus_per_worker,
        "precision": training.precision,
    }
    prior = None
    if prior_sampler is not None:
        prior = PriorSet(backbone.hash, class_prompt(subject.class_noun), prior_sampler, options.run.seed)
    samples = SamplerSettings(
        batch=1,  # alone, an image is the same as in any plain diffusers call
        **sampling,
        **_drawing(options, backbone),
    )
    templates = spec.prompts or options.samples.sample_prompts or default_samples(subject.class_noun)
    phrase = subject_phrase(training, identifier.text, subject.class_noun)
    prompts = tuple(fill(template, phrase) for template in templates)
    backbone.tokenize(prompts)
    run = RunSpec(
        subject=subject.name,
        class_noun=subject.class_noun,
        identifier=identifier.text,
        token_ids=identifier.token_ids,
        images=tuple((image.name, image.sha256) for image in subject.images),
        backbone=backbone.hash,
        training=training,
        lane=lane,
        prior=prior,
        samples=samples,
        sample_prompts=prompts,
        seed=options.run.seed,
        captions=photo_prompts(subject, phrase, backbone),
    )
    return PlannedSubject(subject, run, found_noun)


def _prior_sampler(options: Options, backbone: Backbone, training: Training, lane: WorkerGroup) -> SamplerSettings:
    chosen, preset = options.prior, preset_of(backbone)
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


def _check_disk(plan: Plan) -> None:
    free = plan.store.free_bytes()
    if free is None:
        return
    needed = disk_bytes(plan)
    if needed > free:
        raise ValueError(
            f"too little disk for store {plan.store.root}: the run needs about {needed / GIB:.1f} GiB (backbone, "
            f"two checkpoints, weights), and {free / GIB:.1f} GiB are free"
        )


def disk_bytes(plan: Plan) -> int:
    """What the run will write at most: the backbone once, two checkpoints and one more in flight, and each version."""
    parameters = sum(memory.parameters for memory in plan.memory)
    files = sum(size for backbone in plan.stored for size in backbone.files.values())
    return files + 3 * 12 * parameters + 4 * parameters * len(plan.subjects)
