"""The plan as a person reads it: what `--dry-run` prints."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from io import StringIO
from textwrap import wrap
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dreambooth.methods import find_method
from dreambooth.runs import PlannedSubject
from dreambooth.subjects.crops import Size, centre_view
from pipelines.planning.command_line import Option, groups, in_words, page_width
from pipelines.planning.options import BY_BACKBONE, Options
from pipelines.planning.plan import Plan, disk_bytes
from pipelines.planning.preflight import in_words as bytes_in_words
from pipelines.planning.settings import machine_preset

_SUBJECTS_IN_FULL = 3
"""With more subjects than these, photos, views and captions are told in short."""
_VALUES_IN_FULL = 4
_BY_MACHINE = ("batch", "precision", "zero_stage", "offload", "gradient_checkpointing")
"""Options for which `--preset` has defaults, besides those for which the method has."""
_MEMORY = ("frozen", "weights", "gradients", "optimizer_states", "activations", "total")


def describe(plan: Plan, width: int | None = None) -> Iterator[str]:
    """The plan as lines of text, of at most `width` characters where words allow it."""
    width = width or page_width()
    yield from _choices(plan, width)
    stored = [(one.source, one.family, one.hash[:12]) for one in plan.stored]
    yield from _table(("Backbone", "family", "hash"), stored, width)
    yield from _subjects(plan, width)
    if plan.subjects:
        yield from _settings(plan.subjects[0], width)
    priors = [(repr(prompt), *counts) for prompt, counts in plan.missing_priors().items()]
    if priors:
        rows = [(prompt, wanted, present, wanted - present) for prompt, wanted, present in priors]
        yield from _table(("Class-prior images", "wanted", "already there", "to make"), rows, width)
    else:
        yield "Class-prior images: none"
        yield ""
    yield from _memory(plan, width)
    yield from plan.preflight.describe()
    free = plan.store.free_bytes()
    room = "an object store" if free is None else f"{bytes_in_words(free)} free"
    yield f"Disk: at most about {bytes_in_words(disk_bytes(plan))} of {room}"


def _choices(plan: Plan, width: int) -> Iterator[str]:
    """What was chosen against the defaults."""
    chosen, defaults = plan.options.as_dict(), Options().as_dict()
    rows = []
    for option in (option for _, group in groups(Options) for option in group):
        value, default = chosen[option.name], _default(plan, option)
        if value != defaults[option.name] and option.name != "dry_run" and in_words(value) != default:
            rows.append((option.flag, _shortened(value), default))
    if rows:
        yield from _table(("Your choices", "value", "default"), rows, width)
    else:
        yield "Your choices: none, all options are at their defaults"
        yield ""


def _default(plan: Plan, option: Option) -> str:
    """The option's default in words: for the plan's backbone and method, and the machine that the options name."""
    chosen, name = plan.options, option.name
    machine = machine_preset(chosen, plan.backbone)
    if machine is not None and name in _BY_MACHINE:
        return in_words(getattr(machine, name))
    if name in ("steps", "learning_rate"):
        with_text = chosen.model.train_text_encoder
        start = find_method(chosen.training.method).defaults(plan.backbone, machine, with_text=with_text)
        return in_words(getattr(start, name))
    if name in BY_BACKBONE:
        return in_words(getattr(plan.backbone.preset, BY_BACKBONE[name]))
    return (option.default or "not given") if option.value else "no"


def _subjects(plan: Plan, width: int) -> Iterator[str]:
    if plan.subjects:
        columns = (f"Subjects ({len(plan.subjects)})", "photos", "class noun", "identifier", "token ids", "version")
        yield from _table(columns, [_subject_row(planned) for planned in plan.subjects], width)
    if len(plan.subjects) > _SUBJECTS_IN_FULL:
        yield from _in_short(plan.subjects, width)
    else:
        for planned in plan.subjects:
            yield f"{planned.subject.name}:"
            for label, text in _details(planned):
                yield from _wrapped(f"  {label:14}", text, width)
            yield ""
    for name, reason in plan.failures.items():
        yield f"{name} cannot be personalized: {reason}"
    if plan.failures:
        yield ""


def _subject_row(planned: PlannedSubject) -> tuple[Any, ...]:
    subject, run = planned.subject, planned.run
    ids = " ".join(map(str, run.token_ids))
    return subject.name, len(subject.images), run.class_noun, repr(run.identifier), ids, run.version


def _details(planned: PlannedSubject) -> Iterator[tuple[str, str]]:
    """What is to be told of a subject, as pairs of label and text."""
    subject, run = planned.subject, planned.run
    yield "photos", f"{len(subject.images)}: {', '.join(image.name for image in subject.images)}"
    yield "prompts", f"{run.instance_prompt!r}; class {run.class_prompt!r}"
    yield from _remarks(planned)
    if run.training.frames or run.training.random_crop:
        for image in subject.images:
            view = centre_view(size := (image.height, image.width), run.training.bucket_of(size))
            yield "view", f"{image.name}: {_pixels(view.bucket)} pixels of {_pixels(view.scaled)}"
    for image, caption in zip(subject.images, run.captions, strict=False):
        yield "caption", f"{image.name}: {caption!r}"


def _in_short(subjects: Sequence[PlannedSubject], width: int) -> Iterator[str]:
    """A line for each subject of which more is to be told than its row in the table tells."""
    for planned in subjects:
        run, told = planned.run, [f"{label} {text}" for label, text in _remarks(planned)]
        if run.training.frames:
            frames = Counter(_pixels(run.training.bucket_of((one.height, one.width))) for one in planned.subject.images)
            told.append("views " + ", ".join(f"{count} of {frame} pixels" for frame, count in frames.items()))
        if run.captions:
            told.append(f"captions {len(run.captions)}, the first {run.captions[0]!r}")
        if told:
            yield from _wrapped(f"{planned.subject.name}: ", "; ".join(told), width)
    yield ""


def _remarks(planned: PlannedSubject) -> Iterator[tuple[str, str]]:
    if planned.found_noun is not None:
        yield "class noun", f"{planned.found_noun}; --class-noun overrides it"
    if planned.subject.skipped:
        yield "passed over", ", ".join(planned.subject.skipped)
    for warning in planned.subject.warnings:
        yield "note", warning


def _wrapped(label: str, text: str, width: int) -> list[str]:
    """A text behind its label, in lines that begin below the text."""
    indent = " " * len(label)
    return wrap(
        text, width, initial_indent=label, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )


def _pixels(size: Size) -> str:
    return f"{size[0]} x {size[1]}"


def _settings(planned: PlannedSubject, width: int) -> Iterator[str]:
    """All settings of the training: of a cascade those of both stages, where they differ."""
    stages = [{**asdict(stage.training), **asdict(stage.lane)} for stage in planned.run.cascade]
    told = []
    for name in stages[0]:
        texts = [_setting(name, stage[name]) for stage in stages]
        if any(texts):
            told.append(
                (
                    name.replace("_", " "),
                    texts[0] if len(set(texts)) == 1 else " / ".join(one or "none" for one in texts),
                )
            )
    title = "Training" if len(stages) == 1 else "Training (stage I / stage II)"
    short = [pair for pair in told if len(pair[1]) <= width // 4]
    middle = (len(short) + 1) // 2
    left, right = short[:middle], [*short[middle:], ("", "")][:middle]
    rows = [(*one, *two) for one, two in zip(left, right, strict=True)]
    yield from _table((title, "", "", ""), rows, width, last=False)
    for name, text in told:
        if len(text) > width // 4:
            yield from _wrapped(f"{name:29}", text, width)
    yield ""


def _setting(name: str, value: Any) -> str:
    """A setting in words; empty where there is none."""
    if value is None or value in ((), [], {}):
        return ""
    if name == "frames":
        return ", ".join(map(_pixels, value))
    if name == "deepspeed":
        return json.dumps(value)
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {in_words(one)}" for key, one in value.items())
    return in_words(value)


def _memory(plan: Plan, width: int) -> Iterator[str]:
    title = f"Memory per device, ZeRO stage {plan.lane.zero_stage}"
    columns = (title, *(["stage I", "stage II"] if len(plan.memory) > 1 else [""]))
    rows = [("parameters trained", *(f"{memory.parameters / 1e6:,.1f} M" for memory in plan.memory))]
    parts = {name: name.replace("_", " ") for name in _MEMORY}
    if any(memory.offloaded for memory in plan.memory):
        parts["offloaded"] = "offloaded to disk" if plan.lane.offload == "nvme" else "offloaded to host"
    for name, label in parts.items():
        rows.append((label, *(bytes_in_words(getattr(memory, name)) for memory in plan.memory)))
    yield from _table(columns, rows, width, numbers=True)


def _shortened(value: Any) -> str:
    if isinstance(value, tuple) and len(value) > _VALUES_IN_FULL:
        return f"{in_words(value[: _VALUES_IN_FULL - 1])} and {len(value) - _VALUES_IN_FULL + 1} more"
    return in_words(value)


def _table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], width: int, *, numbers: bool = False, last: bool = True
) -> Iterator[str]:
    """A table under its headings, the first of which is its title, and an empty line unless more belongs to it."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if numbers and number else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(str, row))
    text = StringIO()
    Console(file=text, width=width, markup=False).print(table)
    yield from (line.rstrip() for line in text.getvalue().splitlines())
    if last:
        yield ""
