"""The plan in words: what `--dry-run` prints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from dreambooth.memory import MemoryPlan
from dreambooth.runs import PlannedSubject
from dreambooth.subjects.crops import centre_view
from pipelines.planning.plan import Plan, disk_bytes
from pipelines.planning.preflight import in_words


def describe(plan: Plan) -> Iterator[str]:
    """The plan as lines of text."""
    yield "Configuration"
    for name, value in plan.options.as_dict().items():
        if value not in (None, (), False):
            yield f"  {name:24} {value}"
    yield "Backbone"
    for backbone in plan.stored:
        yield f"  {backbone.source} ({backbone.family}), hash {backbone.hash[:12]}"
    for planned in plan.subjects:
        yield from _describe_subject(planned)
    for name, reason in plan.failures.items():
        yield f"Subject {name} cannot be personalized: {reason}"
    if plan.subjects:
        for stage in plan.subjects[0].run.cascade:
            yield "Training" if stage.training.low_resolution is None else "Training of super-resolution"
            for name, value in {**asdict(stage.training), **asdict(stage.lane)}.items():
                yield f"  {name:24} {value}"
    yield "Class-prior images"
    for prompt, (wanted, present) in plan.missing_priors().items():
        yield f"  {prompt!r}: {wanted} wanted, {present} already there, {wanted - present} to make"
    for memory in plan.memory:
        yield from _describe_memory(plan, memory)
    yield from plan.preflight.describe()
    free = plan.store.free_bytes()
    yield f"Disk: about {in_words(disk_bytes(plan))} of {in_words(free) if free is not None else 'an object store'}"


def _describe_subject(planned: PlannedSubject) -> Iterator[str]:
    subject, run = planned.subject, planned.run
    yield f"Subject {subject.name}"
    yield f"  images        {len(subject.images)}: {', '.join(image.name for image in subject.images)}"
    for skipped in subject.skipped:
        yield f"  passed over   {skipped}"
    for warning in subject.warnings:
        yield f"  note          {warning}"
    yield f"  identifier    {run.identifier!r}, token ids {list(run.token_ids)}"
    if planned.found_noun is not None:
        yield f"  class noun    {planned.found_noun}; --class-noun overrides it"
    yield f"  prompts       {run.instance_prompt!r}; class {run.class_prompt!r}"
    if run.training.frames or run.training.random_crop:
        for image in subject.images:
            view = centre_view(size := (image.height, image.width), run.training.bucket_of(size))
            bucket, scaled = (f"{height} x {width}" for height, width in (view.bucket, view.scaled))
            yield f"  frame         {image.name}: {bucket} pixels of {scaled}"
    for image, caption in zip(subject.images, run.captions, strict=False):
        yield f"  caption       {image.name}: {caption!r}"
    yield f"  version       {run.subject}@{run.version}"


def _describe_memory(plan: Plan, memory: MemoryPlan) -> Iterator[str]:
    yield f"Memory per device (ZeRO stage {plan.lane.zero_stage}, {memory.parameters / 1e6:,.1f} M parameters trained)"
    for name in ("frozen", "weights", "gradients", "optimizer_states", "activations", "total"):
        yield f"  {name.replace('_', ' '):18} {in_words(getattr(memory, name)):>12}"
    if memory.offloaded:
        place = "offloaded to disk" if plan.lane.offload == "nvme" else "offloaded to host"
        yield f"  {place:18} {in_words(memory.offloaded):>12}"
