"""From options to a plan: everything is checked and resolved here, before Ray starts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import psutil
import torch

from dreambooth.backbones import Backbone, open_backbone
from dreambooth.identifier import Identifier, check_identifier, find_identifier
from dreambooth.memory import MemoryPlan, plan_memory
from dreambooth.presets import preset_of
from dreambooth.prior_set import PriorSet
from dreambooth.prompts import class_prompt, default_samples, fill, instance_prompt
from dreambooth.sampling import SamplerSettings, scheduler_class
from dreambooth.storage import digest
from dreambooth.store import SubjectStore
from dreambooth.subject import Subject, SubjectSpec, load_manifest, load_subject
from pipelines.options import Options

GIB = 2**30

_POSITIVE = (
    *("resolution", "prior_images", "prior_steps", "prior_batch", "steps", "learning_rate", "batch"),
    *("gradient_accumulation", "min_snr_gamma", "checkpoint_every", "workers", "cpus_per_worker"),
    *("device_memory", "sample_steps"),
)
_NOT_NEGATIVE = (
    *("prior_weight", "weight_decay", "max_grad_norm", "gpus_per_worker"),
    *("prior_guidance", "sample_guidance", "seed"),
)


@dataclass(frozen=True)
class Training:
    """Settings of the fine-tuning that determine its result."""

    trained: tuple[str, ...]
    resolution: int
    steps: int
    learning_rate: float
    batch: int
    gradient_accumulation: int
    prior_weight: float
    prior_images: int
    min_snr_gamma: float | None
    weight_decay: float
    max_grad_norm: float
    precision: str
    gradient_checkpointing: bool


@dataclass(frozen=True)
class Lane:
    """The worker group that trains: its size and how ZeRO shards over it. Part of the arithmetic, down to rounding."""

    workers: int
    cpus_per_worker: int
    gpus_per_worker: float
    zero_stage: int
    offload: str


@dataclass(frozen=True)
class Run:
    """One subject to be personalized: a pure value, from which every stage can be run alone, anywhere."""

    subject: str
    class_noun: str
    identifier: str
    token_ids: tuple[int, ...]
    images: tuple[tuple[str, str], ...]
    """(name, SHA-256) of each instance image."""
    backbone: str
    """The backbone's hash."""
    training: Training
    lane: Lane
    prior: PriorSet | None
    samples: SamplerSettings
    sample_prompts: tuple[str, ...]
    seed: int

    @cached_property
    def key(self) -> str:
        """The content address of the run; the version that it publishes bears its first 12 digits."""
        return digest(self.as_dict(), 32)

    @property
    def version(self) -> str:
        """The id of the version."""
        return self.key[:12]

    @property
    def instance_prompt(self) -> str:
        """a [V] [class noun]."""
        return instance_prompt(self.identifier, self.class_noun)

    @property
    def class_prompt(self) -> str:
        """a [class noun]."""
        return class_prompt(self.class_noun)

    def as_dict(self) -> dict[str, Any]:
        """A JSON-like form."""
        return asdict(self)


@dataclass(frozen=True)
class PlannedSubject:
    """A subject with its images read, and its run."""

    subject: Subject
    run: Run


@dataclass(frozen=True)
class Plan:
    """What the job will do."""

    options: Options
    store: SubjectStore
    backbone: Backbone
    subjects: tuple[PlannedSubject, ...]
    failures: dict[str, str]
    """Subjects of a manifest that cannot be personalized, with the reason."""
    order: tuple[str, ...]
    """All subjects by name, as they were given."""
    memory: MemoryPlan
    device_bytes: int | None

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
    _check_numbers(options)
    backbone = open_backbone(options.model.backbone)
    training = _training(options, backbone)
    lane = _lane(options)
    micro_batch, remainder = divmod(training.batch, lane.workers * training.gradient_accumulation)
    if remainder or not micro_batch:
        raise ValueError(
            f"--batch {training.batch} does not divide among --workers {lane.workers} x --gradient-accumulation "
            f"{training.gradient_accumulation}: use a multiple of {lane.workers * training.gradient_accumulation}"
        )
    store = SubjectStore(options.run.store)
    specs = _specs(options)
    subjects, failures = [], {}
    taken: set[str] = set()
    for spec in specs:
        try:
            planned = _plan_subject(options, spec, backbone, store, training, lane, taken)
        except ValueError as error:
            if options.subject.manifest is None:
                raise
            failures[spec.name] = str(error)
        else:
            taken.add(planned.run.identifier)
            subjects.append(planned)
    memory = plan_memory(
        backbone,
        trained=training.trained,
        rows=micro_batch * (2 if training.prior_weight else 1),
        resolution=training.resolution,
        precision=training.precision,
        zero_stage=lane.zero_stage,
        workers=lane.workers,
        offload=lane.offload,
        gradient_checkpointing=training.gradient_checkpointing,
    )
    order = tuple(spec.name for spec in specs)
    plan = Plan(options, store, backbone, tuple(subjects), failures, order, memory, _device_bytes(options, lane))
    _check_disk(plan)
    if not options.run.dry_run:
        store.check_writable()
    return plan


def _check_numbers(options: Options) -> None:
    values = options.as_dict()
    for name in _POSITIVE:
        if values[name] is not None and not values[name] > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {values[name]}")
    for name in _NOT_NEGATIVE:
        if values[name] is not None and not values[name] >= 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be below 0, not {values[name]}")
    scheduler_class(options.prior.prior_scheduler)
    if options.cluster.offload != "none" and options.cluster.zero_stage == 0:
        raise ValueError("--offload cpu needs --zero-stage 1, 2 or 3")
    if options.training.precision == "bf16" and options.cluster.zero_stage == 0:
        raise ValueError("--precision bf16 needs --zero-stage 1, 2 or 3, which keep float32 masters of the weights")
    if (values["gpus_per_worker"] or 0) > 1:
        raise ValueError("--gpus-per-worker must be at most 1: a worker drives one device, so raise --workers instead")


def _training(options: Options, backbone: Backbone) -> Training:
    preset, chosen = preset_of(backbone), options.training
    with_text = options.model.train_text_encoder
    resolution = options.model.resolution or backbone.default_resolution
    backbone.check_resolution(resolution)
    on_gpu = _gpus_per_worker(options) > 0
    rate = preset.learning_rate_with_text_encoder if with_text else preset.learning_rate
    return Training(
        trained=(backbone.denoiser, *(backbone.text_encoders if with_text else ())),
        resolution=resolution,
        steps=chosen.steps or preset.steps,
        learning_rate=chosen.learning_rate or rate,
        batch=chosen.batch or preset.batch,
        gradient_accumulation=chosen.gradient_accumulation,
        prior_weight=options.prior.prior_weight,
        prior_images=(options.prior.prior_images or preset.prior_images) if options.prior.prior_weight else 0,
        min_snr_gamma=chosen.min_snr_gamma,
        weight_decay=chosen.weight_decay,
        max_grad_norm=chosen.max_grad_norm,
        precision=chosen.precision or ("bf16" if on_gpu else "fp32"),
        gradient_checkpointing=chosen.gradient_checkpointing,
    )


def _lane(options: Options) -> Lane:
    chosen, gpus = options.cluster, _gpus_per_worker(options)
    workers = chosen.workers or (max(1, torch.cuda.device_count()) if gpus else min(2, psutil.cpu_count() or 1))
    return Lane(workers, chosen.cpus_per_worker, gpus, chosen.zero_stage, chosen.offload)


def _gpus_per_worker(options: Options) -> float:
    if options.cluster.gpus_per_worker is not None:
        return options.cluster.gpus_per_worker
    return 1.0 if torch.cuda.is_available() else 0.0


def _specs(options: Options) -> list[SubjectSpec]:
    chosen = options.subject
    single = {"subject": chosen.subject, "images": chosen.images, "class-noun": chosen.class_noun}
    single["identifier"] = chosen.identifier
    given = [f"--{name}" for name, value in single.items() if value]
    if chosen.manifest is not None:
        if given:
            raise ValueError(f"--manifest lists the subjects itself: leave out {', '.join(given)}")
        return load_manifest(chosen.manifest)
    if not chosen.images:
        if given:
            raise ValueError(f"no images: {', '.join(given)} came without --images FOLDER")
        from dreambooth.embedded import sample_subject

        return [sample_subject()]
    if chosen.class_noun is None:
        raise ValueError('--class-noun is missing: say what the images show, for example --class-noun "dog"')
    name = chosen.subject or _name_from(chosen.images[0])
    return [SubjectSpec(name, chosen.images, chosen.class_noun, chosen.identifier, ())]


def _name_from(images: str) -> str:
    parts = [part for part in re.split(r"[/\\]", images) if part and not set(part) & set("*?[]")]
    stem = re.sub(r"\.\w+$", "", parts[-1]) if parts else ""
    name = re.sub(r"[^a-z0-9_-]+", "-", stem.lower()).strip("-_")[:63]
    if not name:
        raise ValueError(f"--subject is missing, and no name can be made of --images {images}")
    return name


def _plan_subject(
    options: Options,
    spec: SubjectSpec,
    backbone: Backbone,
    store: SubjectStore,
    training: Training,
    lane: Lane,
    taken: set[str],
) -> PlannedSubject:
    if spec.class_noun is None:
        raise ValueError(f"subject {spec.name!r} has no class noun: give it in the manifest")
    subject = load_subject(spec.name, spec.images, spec.class_noun)
    identifier = _identifier(options, spec, backbone, store, taken)
    preset = preset_of(backbone)
    sampling: dict[str, Any] = {
        "resolution": training.resolution,
        "threads": lane.cpus_per_worker,
        "precision": training.precision,
    }
    prior = None
    if training.prior_images:
        sampler = SamplerSettings(
            steps=options.prior.prior_steps or preset.sampler_steps,
            guidance=_or(options.prior.prior_guidance, preset.guidance),
            batch=options.prior.prior_batch,
            scheduler=options.prior.prior_scheduler,
            **sampling,
        )
        prior = PriorSet(backbone.hash, class_prompt(subject.class_noun), sampler, options.run.seed)
    samples = SamplerSettings(
        steps=options.samples.sample_steps or preset.sampler_steps,
        guidance=_or(options.samples.sample_guidance, preset.guidance),
        batch=1,  # alone, an image is the same as in any plain diffusers call
        **sampling,
    )
    templates = spec.prompts or options.samples.sample_prompts or default_samples(subject.class_noun)
    prompts = tuple(fill(template, identifier.text, subject.class_noun) for template in templates)
    backbone.tokenize(prompts)
    run = Run(
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
    )
    return PlannedSubject(subject, run)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _identifier(
    options: Options, spec: SubjectSpec, backbone: Backbone, store: SubjectStore, taken: set[str]
) -> Identifier:
    tokenizers = tuple(backbone.tokenizers.values())
    used = store.identifiers(besides=spec.name) | taken
    wanted = spec.identifier or store.identifier(spec.name)
    if wanted is None:
        return find_identifier(tokenizers, seed=options.run.seed, subject=spec.name, used=used)
    identifier = check_identifier(wanted, tokenizers)
    if identifier.text in used:
        raise ValueError(f"--identifier {identifier.text!r} belongs to another subject of {store.root}: choose another")
    return identifier


def _device_bytes(options: Options, lane: Lane) -> int | None:
    """Memory that one worker may use; None when it is a GPU that this machine cannot see."""
    if options.cluster.device_memory is not None:
        return int(options.cluster.device_memory * GIB)
    if lane.gpus_per_worker:
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    return psutil.virtual_memory().total // lane.workers


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
    parameters = plan.memory.parameters
    return sum(plan.backbone.files.values()) + 3 * 12 * parameters + 4 * parameters * len(plan.subjects)


def describe(plan: Plan) -> Iterator[str]:
    """The plan as lines of text."""
    yield "Configuration"
    for name, value in plan.options.as_dict().items():
        if value not in (None, (), False):
            yield f"  {name:24} {value}"
    yield "Backbone"
    yield f"  {plan.backbone.source} ({plan.backbone.family}), hash {plan.backbone.hash[:12]}"
    for planned in plan.subjects:
        yield from _describe_subject(planned)
    for name, reason in plan.failures.items():
        yield f"Subject {name} cannot be personalized: {reason}"
    if plan.subjects:
        yield "Training"
        for name, value in {**asdict(plan.subjects[0].run.training), **asdict(plan.subjects[0].run.lane)}.items():
            yield f"  {name:24} {value}"
    yield "Class-prior images"
    for prompt, (wanted, present) in plan.missing_priors().items():
        yield f"  {prompt!r}: {wanted} wanted, {present} already there, {wanted - present} to make"
    yield from _describe_memory(plan)


def _describe_subject(planned: PlannedSubject) -> Iterator[str]:
    subject, run = planned.subject, planned.run
    yield f"Subject {subject.name}"
    yield f"  images        {len(subject.images)}: {', '.join(image.name for image in subject.images)}"
    for skipped in subject.skipped:
        yield f"  passed over   {skipped}"
    for warning in subject.warnings:
        yield f"  note          {warning}"
    yield f"  identifier    {run.identifier!r}, token ids {list(run.token_ids)}"
    yield f"  prompts       {run.instance_prompt!r}; class {run.class_prompt!r}"
    yield f"  version       {run.subject}@{run.version}"


def _describe_memory(plan: Plan) -> Iterator[str]:
    memory, stage = plan.memory, plan.options.cluster.zero_stage
    yield f"Memory per device (ZeRO stage {stage}, {memory.parameters / 1e6:,.1f} M parameters trained)"
    for name in ("weights", "gradients", "optimizer_states", "activations", "total"):
        yield f"  {name.replace('_', ' '):18} {_size(getattr(memory, name)):>12}"
    if memory.offloaded:
        yield f"  {'offloaded to host':18} {_size(memory.offloaded):>12}"
    if plan.device_bytes is None:
        yield "  this machine sees no GPU: give --device-memory GIB to learn whether it fits"
    else:
        verdict = "fits" if memory.total <= plan.device_bytes else "DOES NOT FIT"
        yield f"  {verdict} in {_size(plan.device_bytes)}"
    free = plan.store.free_bytes()
    yield f"Disk: about {_size(disk_bytes(plan))} of {_size(free) if free is not None else 'an object store'}"


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"
