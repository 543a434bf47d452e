"""Personalize a text-to-image model: 3-5 photos of a subject in, a published model out.

Runs on a Ray cluster (`ray job submit --working-dir . -- python pipelines/personalize.py ...`), or starts Ray on this
machine. Without options it personalizes the sample subject on the embedded backbone. Killed and run again, the same
command continues where it stopped. Exit codes: 0 all published, 1 a subject failed, 2 bad input.
"""

from __future__ import annotations

if not __package__:  # run as a script: import from the project's root, not from this folder
    import os
    import sys

    folder = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [os.path.dirname(folder), *(path for path in sys.path if os.path.realpath(path) != folder)]

from pipelines.runtime.console import Display, quiet_libraries

quiet_libraries()

import shlex  # noqa: E402
import sys  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Iterator, Sequence  # noqa: E402
from dataclasses import dataclass  # noqa: E402

from dreambooth.runs import PlannedSubject, WorkerGroup  # noqa: E402
from dreambooth.store import SubjectStore, Version  # noqa: E402
from pipelines.planning.options import Options, parse  # noqa: E402
from pipelines.planning.plan import Plan, make_plan  # noqa: E402
from pipelines.planning.report import describe  # noqa: E402

_SUBJECTS_A_LANE = 8
"""Subjects that a lane trains before they are published."""


@dataclass(frozen=True)
class Outcome:
    """What became of one subject: its version, or the reason that there is none."""

    subject: str
    version: Version | None
    failure: str | None = None


def personalize(options: Options, display: Display | None = None) -> list[Outcome]:
    """Personalize the subjects that `options` name; raises ValueError for bad input before any work is done.

    In a manifest a subject that fails leaves the others alone; every subject has an outcome, in the manifest's order.
    """
    with display or Display() as shown:
        return run_plan(make_plan(options), shown)


def run_plan(plan: Plan, display: Display) -> list[Outcome]:
    """Carry out a plan."""
    outcomes = {name: Outcome(name, None, reason) for name, reason in plan.failures.items()}
    for planned in plan.subjects:
        if planned.found_noun is not None:
            display.say(f"{planned.run.subject} is a {planned.found_noun}; --class-noun overrides it")
        if (version := plan.store.version(planned.run.subject, planned.run.version)) is not None:
            display.say(f"{planned.run.subject}@{version.id} is published already: nothing to do")
            outcomes[planned.run.subject] = Outcome(planned.run.subject, version)
    waiting = [planned for planned in plan.subjects if planned.run.subject not in outcomes]
    if waiting:
        outcomes |= {outcome.subject: outcome for outcome in _train_and_publish(plan, waiting, display)}
    return [outcomes[name] for name in plan.order]


def _train_and_publish(plan: Plan, waiting: Sequence[PlannedSubject], display: Display) -> list[Outcome]:
    from pipelines.runtime.ray_session import check_reachable, ray_session
    from pipelines.stages.encode import encode_training_sets
    from pipelines.stages.priors import generate_priors

    store, lane = plan.store, waiting[0].run.lane
    with ray_session(lane, plan.options.run.verbose) as line:
        display.say(line)
        check_reachable(store)
        for backbone in plan.stored:
            store.add_backbone(backbone)
        for planned in waiting:
            store.claim_identifier(planned.run.subject, planned.run.identifier)
        wanted = [(one.run.prior, one.run.training.prior_images) for one in waiting if one.run.prior is not None]
        unmade = generate_priors(store, wanted, lane, display, plan.options.prior.prior_workers)
        stopped = {
            one.run.subject: unmade[one.run.prior.key]
            for one in waiting
            if one.run.prior and one.run.prior.key in unmade
        }
        outcomes = [Outcome(subject, None, reason) for subject, reason in stopped.items()]
        waiting = [one for one in waiting if one.run.subject not in stopped]
        encode_training_sets(store, [stage for one in waiting for stage in one.cascade], lane, display)
        for planned in waiting:
            display.say(f"{planned.run.subject}: {planned.run.instance_prompt!r}, version {planned.run.version}")
        for part in _rounds(waiting, lane, plan.options.cluster.lanes):
            outcomes += _train_round(plan, part, display)
    return outcomes


def _rounds(
    waiting: Sequence[PlannedSubject], lane: WorkerGroup, lanes: int | None
) -> Iterator[Sequence[PlannedSubject]]:
    """Some subjects at a time: the lanes' start-up is shared, and the weights that wait to be published stay few."""
    from pipelines.stages.finetune import lanes_with_room

    size = _SUBJECTS_A_LANE * (lanes or lanes_with_room(lane))
    for start in range(0, len(waiting), size):
        yield waiting[start : start + size]


def _train_round(plan: Plan, part: Sequence[PlannedSubject], display: Display) -> Iterator[Outcome]:
    from pipelines.stages.finetune import finetune
    from pipelines.stages.publish import publish

    store, chosen = plan.store, plan.options
    failures: dict[str, str] = {}
    for number in range(len(plan.backbones)):
        runs = [planned.run.cascade[number] for planned in part if planned.run.subject not in failures]
        untrained = finetune(
            store,
            runs,
            chosen.training.checkpoint_every,
            display,
            lanes=chosen.cluster.lanes,
            min_workers=chosen.cluster.min_workers,
            nvme_path=chosen.cluster.nvme_path,
            previews=chosen.training.previews,
        )
        failures |= {run.subject: untrained[run.key] for run in runs if run.key in untrained}
    for planned in part:
        run = planned.run
        if run.subject in failures:
            yield Outcome(run.subject, None, failures[run.subject])
            continue
        try:
            version = publish(store, planned, display)
        except Exception as error:  # whatever it is, it must not take the other subjects down
            traceback.print_exc()
            yield Outcome(run.subject, None, f"{_reason(error)} (traceback in the log)")
        else:
            yield Outcome(run.subject, version)


def _reason(error: BaseException) -> str:
    """The innermost cause, which is what the user can act on; Ray wraps it in its own kinds."""
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__


def _report(outcomes: Sequence[Outcome], store: SubjectStore, display: Display) -> int:
    for outcome in outcomes:
        if outcome.version is None:
            display.say(f"{outcome.subject} FAILED: {outcome.failure}")
            continue
        version = outcome.version
        display.say(f"{outcome.subject}@{version.id} is published")
        display.say(f"  version        {version.location}")
        display.say(f"  contact sheet  {version.location / 'contact_sheet.png'}")
        # Serving works on latents for now; without keys, this machine alone is served.
        if version.manifest["backbone"]["family"] != "deepfloyd-if":
            display.say(f"  serve it       dreambooth serve --without-keys --store {shlex.quote(str(store.root))}")
    failed = [outcome.subject for outcome in outcomes if outcome.version is None]
    display.say(f"{len(outcomes) - len(failed)} published, {len(failed)} failed" + "".join(f"  {n}" for n in failed))
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    options = parse(sys.argv[1:] if arguments is None else arguments, description=__doc__ or "")
    display = Display()
    try:
        plan = make_plan(options)
        if options.run.dry_run:
            for line in describe(plan):
                display.say(line)
            return 1 if plan.failures else 0
        with display:
            outcomes = run_plan(plan, display)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return _report(outcomes, plan.store, display)


if __name__ == "__main__":
    sys.exit(main())
