"""Score published versions by the paper's protocol (Ruiz et al., CVPR 2023, section 4).

Draws 4 pictures for each of DreamBench's 25 prompts and 100 of the class with a version's weights, compares them with
the subject's photos, and writes DINO, CLIP-I, CLIP-T, PRES and DIV into the store. All versions of a subject, with and
without the prior term or by Textual Inversion, are drawn from the same seeds: their rows in the table compare. Killed
and run again, the same command continues where it stopped. Exit codes: 0 all scored, 1 a version failed, 2 bad input.
"""

from __future__ import annotations

if not __package__:  # run as a script: import from the project's root, not from this folder
    import os
    import sys

    folder = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [os.path.dirname(folder), *(path for path in sys.path if os.path.realpath(path) != folder)]

from pipelines.runtime.console import Display, quiet_libraries

quiet_libraries()

import sys  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from dataclasses import dataclass, replace  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Annotated, Literal  # noqa: E402

import torch  # noqa: E402

from dreambooth.backbones import open_backbone  # noqa: E402
from dreambooth.embedded import sample_subject  # noqa: E402
from dreambooth.metrics.evaluation_set import EvaluationSet  # noqa: E402
from dreambooth.metrics.scores import Judging  # noqa: E402
from dreambooth.runs import Resources  # noqa: E402
from dreambooth.store import SubjectStore, Version  # noqa: E402
from dreambooth.subjects.manifest import SubjectSpec, load_manifest  # noqa: E402
from dreambooth.subjects.prompts import PLACEHOLDER, dreambench_prompts, fill  # noqa: E402
from dreambooth.versions.pipeline import published_samplers  # noqa: E402
from pipelines.planning.command_line import read_arguments, show_help_if_asked, shown  # noqa: E402
from pipelines.stages.score import PlannedEvaluation, Scored, draw_pictures, score_versions  # noqa: E402
from pipelines.stages.score_table import score_table, write_csv  # noqa: E402

FIRST = ("subject", "images", "manifest", "versions", "store", "class_images", "lpips", "csv")
"""The options of a first run, which `--help` shows."""


@dataclass(frozen=True)
class _ScoredOptions:
    """What is scored."""

    subject: Annotated[str | None, shown("the sample subject", "NAME")] = None
    """The subject's name in the store."""
    images: Annotated[tuple[str, ...], shown("the sample subject's", "PATH ...")] = ()
    """Its photos, which its pictures are compared with: a folder, glob, file or URI, or several of them."""
    manifest: Annotated[str | None, shown("", "PATH")] = None
    """Many subjects: a YAML file, or a folder with one folder a subject. Takes the place of --subject and --images."""
    versions: Literal["newest", "all"] = "newest"
    """Which of a subject's versions."""
    store: Annotated[str, shown("~/dreambooth-store", "FOLDER|URI")] = "~/dreambooth-store"
    """Subject store: a folder, or a URI such as s3://bucket/store."""


@dataclass(frozen=True)
class _PictureOptions:
    """The pictures."""

    prompts: Annotated[tuple[str, ...], shown("DreamBench's 25, for objects or for live subjects", "PROMPT ...")] = ()
    """Prompts with {subject}."""
    images_a_prompt: int = 4
    """Pictures of each prompt; DIV needs two at least."""
    class_images: int = 100
    """Pictures of "a [class noun]", for PRES; 0 leaves PRES out."""
    steps: Annotated[int | None, shown("those of the samples published with the version")] = None
    """Sampler steps of a picture."""
    guidance: Annotated[float | None, shown("that of the samples published with the version")] = None
    """Guidance scale."""
    batch: Annotated[int | None, shown("--images-a-prompt")] = None
    """Pictures drawn at once."""
    seed: int = 0
    """All pictures follow from it."""


@dataclass(frozen=True)
class _JudgeOptions:
    """The models that score."""

    dino: Annotated[str, shown(Judging.dino, "MODEL")] = Judging.dino
    """Scores DINO and PRES: hub id or folder of a ViT."""
    clip: Annotated[str, shown(Judging.clip, "MODEL")] = Judging.clip
    """Scores CLIP-I and CLIP-T: hub id or folder of a CLIP."""
    lpips: Annotated[str | None, shown("", "FILE")] = None
    """Scores DIV: the file that `python -m dreambooth.metrics.lpips FILE` writes. Without it DIV is left out."""
    embedded_judges: Annotated[bool | None, shown("True where all versions are of the embedded backbone")] = None
    """Score by the small models that come with the project, under their own names."""


@dataclass(frozen=True)
class _ClusterOptions:
    """Workers."""

    workers: Annotated[int | None, shown("as many as the cluster has room for")] = None
    """Processes that draw and score."""
    cpus_per_worker: int = 1
    """CPU cores of a worker."""
    gpus_per_worker: Annotated[float | None, shown("1 with a local GPU, else 0")] = None
    """GPUs of a worker. Give it when the cluster has GPUs and this machine has none."""


@dataclass(frozen=True)
class _OutputOptions:
    """What is shown and written."""

    csv: Annotated[str | None, shown("", "FILE")] = None
    """Write the table of scores to this file too."""
    verbose: bool = False
    """Show the logs of Ray and the workers here too."""


@dataclass(frozen=True)
class EvaluateOptions(_ScoredOptions, _PictureOptions, _JudgeOptions, _ClusterOptions, _OutputOptions):
    """What is scored, and how. Without images or a manifest, the sample subject that comes with the project."""


@dataclass(frozen=True)
class EvaluationPlan:
    """What is to be scored, by whom."""

    store: SubjectStore
    versions: list[PlannedEvaluation]
    failures: dict[str, str]
    """Subjects of a manifest that cannot be scored, with the reasons."""
    judging: Judging


def evaluate(options: EvaluateOptions, display: Display | None = None) -> list[Scored]:
    """Score the versions that `options` name; raises ValueError for bad input before any work is done.

    In a manifest a subject without a version or with a broken photo leaves the others alone.
    """
    with display or Display() as shown:
        return _carry_out(options, plan(options), shown)


def plan(options: EvaluateOptions) -> EvaluationPlan:
    """Check everything, and find what is to be scored."""
    for name in ("images_a_prompt", "steps", "batch", "workers", "cpus_per_worker"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {value}")
    if options.class_images < 0:
        raise ValueError(f"--class-images must not be below 0, not {options.class_images}")
    for template in options.prompts:
        if PLACEHOLDER not in template:
            raise ValueError(f"prompt {template!r} does not name the subject: write {PLACEHOLDER} where it stands")
        fill(template, "dog")
    if options.csv is not None and not Path(options.csv).expanduser().absolute().parent.is_dir():
        raise ValueError(f"--csv {options.csv} is in no folder that exists")
    store = SubjectStore(options.store)
    store.check_writable()
    planned: list[PlannedEvaluation] = []
    failures: dict[str, str] = {}
    specs = _specs(options)
    for spec in specs:
        try:
            found = [PlannedEvaluation(spec, one, _pictures(options, one)) for one in _versions(options, store, spec)]
            found[0].photos()
        except ValueError as error:
            failures[spec.name] = str(error)
        else:
            planned += found
    if not planned:
        raise ValueError(next(iter(failures.values())))
    judging = _judging(options, planned)
    judging.load()
    return EvaluationPlan(store, planned, failures, judging)


def _specs(options: EvaluateOptions) -> list[SubjectSpec]:
    if options.manifest is not None:
        if options.images or options.subject:
            raise ValueError("--manifest lists the subjects itself: leave out --images and --subject")
        return load_manifest(options.manifest)
    if not options.images:
        if options.subject is not None:
            raise ValueError(f"no photos: --subject {options.subject} came without --images FOLDER")
        return [sample_subject()]
    if options.subject is None:
        raise ValueError("--subject is missing: the name of these images' subject in the store")
    return [SubjectSpec(options.subject, options.images)]


def _versions(options: EvaluateOptions, store: SubjectStore, spec: SubjectSpec) -> list[Version]:
    versions = store.versions(spec.name)
    if not versions:
        raise ValueError(f"{store.root} holds no version of {spec.name!r}: personalize it first, or leave it out")
    return versions if options.versions == "all" else versions[-1:]


def _pictures(options: EvaluateOptions, version: Version) -> EvaluationSet:
    manifest = version.manifest
    first, *rest = published_samplers(version)
    first = replace(
        first,
        steps=options.steps or first.steps,
        guidance=first.guidance if options.guidance is None else options.guidance,
        batch=options.batch or options.images_a_prompt,
    )
    return EvaluationSet(
        subject=version.subject,
        version=version.id,
        phrase=manifest["phrase"],
        class_noun=manifest["class_noun"],
        templates=tuple(dict.fromkeys(options.prompts)) or dreambench_prompts(manifest["class_noun"]),
        images_a_prompt=options.images_a_prompt,
        class_images=options.class_images,
        samplers=(first, *(replace(one, batch=first.batch) for one in rest)),
        seed=options.seed,
    )


def _judging(options: EvaluateOptions, planned: Sequence[PlannedEvaluation]) -> Judging:
    embedded = options.embedded_judges
    if embedded is None:
        hashes = {one.version.manifest["backbone"]["hash"] for one in planned}
        embedded = hashes == {open_backbone("embedded").hash}
    return Judging.embedded() if embedded else Judging(options.dino, options.clip, options.lpips)


def _carry_out(options: EvaluateOptions, plan: EvaluationPlan, display: Display) -> list[Scored]:
    from pipelines.runtime.ray_session import check_reachable, ray_session

    gpus = options.gpus_per_worker if options.gpus_per_worker is not None else float(torch.cuda.is_available())
    resources = Resources(options.workers or 1, options.cpus_per_worker, gpus)
    with ray_session(resources, options.verbose) as line:
        display.say(line)
        check_reachable(plan.store)
        undrawn = draw_pictures(plan.store, plan.versions, resources, display, options.workers)
        scored = score_versions(plan.store, plan.versions, plan.judging, resources, display, undrawn, options.workers)
    return scored + [Scored(subject, "", {}, reason) for subject, reason in plan.failures.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    show_help_if_asked(EvaluateOptions, arguments, __doc__ or "", FIRST)
    options = read_arguments(EvaluateOptions, arguments)
    display = Display()
    try:
        planned = plan(options)
        with display:
            outcomes = _carry_out(options, planned, display)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = [one for one in outcomes if one.failure]
    for one in failed:
        display.say(f"{'@'.join(filter(None, (one.subject, one.version)))} FAILED: {one.failure}")
    scored = [one for one in outcomes if not one.failure]
    names = planned.judging.names()
    for line in score_table(scored, names):
        display.say(line)
    if options.csv is not None:
        write_csv(options.csv, scored, names)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
