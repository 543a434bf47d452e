"""From options to a plan: everything is checked and resolved here, before Ray starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dreambooth.backbones import (
    Backbone,
    DeepFloydIFSuperResolution,
    Upscaler,
    open_backbone,
)
from dreambooth.memory import MemoryPlan
from dreambooth.runs import PlannedSubject, RunSpec, Training, WorkerGroup, subject_phrase
from dreambooth.sampling.prior_set import PriorSet
from dreambooth.sampling.sampler import SamplerSettings
from dreambooth.store import SubjectStore
from dreambooth.subjects.manifest import SubjectSpec
from dreambooth.subjects.prompts import class_prompt, default_samples, fill
from pipelines.planning.cascade import open_upscaler, super_resolution, with_super_resolution, with_upscaling
from pipelines.planning.options import Options
from pipelines.planning.preflight import Preflight
from pipelines.planning.settings import drawing, machine_preset, training_settings
from pipelines.planning.settings import prior_sampler as prior_sampler_of
from pipelines.planning.subjects import identifier_of, photo_prompts, read_subject, subject_specs
from pipelines.planning.validation import check_options
from pipelines.planning.workers import GIB, check_engine, check_nvme_path, device_bytes, make_lane


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
    training = training_settings(options, backbone)
    stages = [(backbone, training)]
    if options.model.super_resolution is not None:
        stages.append(super_resolution(options, backbone, training))
    upscaler = open_upscaler(options)
    lane = make_lane(options, machine_preset(options, backbone))
    check_nvme_path(options, lane)
    for stage in stages:
        check_engine(*stage, lane)
    preflight = Preflight(stages, lane, device_bytes(options, lane))
    store = SubjectStore(options.run.store)
    specs = subject_specs(options)
    prior_sampler = prior_sampler_of(options, backbone, training, lane) if training.prior_images else None
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
            subjects.append(with_upscaling(with_super_resolution(planned, options, *stages[1:]), options, upscaler))
    order = tuple(spec.name for spec in specs)
    backbones = tuple(backbone for backbone, _ in stages)
    plan = Plan(options, store, backbones, tuple(subjects), failures, order, lane, preflight, upscaler)
    _check_disk(plan)
    if not options.run.dry_run:
        store.check_writable()
    return plan


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
        **drawing(options, backbone),
    )
    templates = spec.prompts or options.samples.sample_prompts or default_samples(subject.class_noun)
    phrase = subject_phrase(training, identifier.text, subject.class_noun)
    prompts = tuple(fill(template, phrase) for template in templates)
    backbone.text.tokenize(prompts)
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
