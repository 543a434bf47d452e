"""From final checkpoints to a published version: weights in diffusers' layout, samples, contact sheet, lineage.

The parts that changed lie in folders named as in the backbone's; those of super-resolution in a folder of that name.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from PIL import Image
from ray.exceptions import RayActorError

from dreambooth.backbones import Backbone
from dreambooth.common.contact_sheet import Row, contact_sheet
from dreambooth.common.images import read_image
from dreambooth.runs import PlannedSubject, RunSpec
from dreambooth.sampling.prior_set import PriorSet
from dreambooth.store import SubjectStore, Version
from dreambooth.subjects.photos import Subject
from dreambooth.versions.pipeline import SUPER_RESOLUTION, VersionPipeline, trained_content
from pipelines.runtime.console import Display, ProgressLine
from pipelines.training.checkpoints import Checkpoint, checkpoint_folder, final_checkpoint
from pipelines.training.run_queue import TRIES

_PRIORS_SHOWN = 6


def publish(store: SubjectStore, planned: PlannedSubject, display: Display) -> Version:
    """Draw the sample prompts with the trained weights, publish everything, and remove the checkpoints.

    A process or node that dies is replaced, as in training.
    """
    checkpoints = [found for stage in planned.run.cascade if (found := final_checkpoint(store, stage)) is not None]
    version = _draw_and_publish(store, planned, checkpoints, display)
    for stage in planned.run.cascade:
        checkpoint_folder(store, stage).delete()
    return version


def _draw_and_publish(
    store: SubjectStore, planned: PlannedSubject, checkpoints: Sequence[Checkpoint], display: Display
) -> Version:
    run = planned.run
    device = {"num_cpus": run.lane.cpus_per_worker, "num_gpus": run.lane.gpus_per_worker or None}
    with display.progress("sample", len(run.sample_prompts), "images") as line:
        tries = 0
        while True:
            tries += 1
            publisher = ray.remote(_Publisher).options(**device).remote(store.root.uri, run, checkpoints)
            try:
                return _publish(publisher, planned, line)
            except RayActorError as error:
                if error.actor_init_failed or tries == TRIES:
                    raise
                display.say(f"{run.subject}: the process that drew its samples died, and is started again: {error}")
            finally:
                ray.kill(publisher)


def _publish(publisher: Any, planned: PlannedSubject, line: ProgressLine) -> Version:
    for number, prompt in enumerate(planned.run.sample_prompts):
        ray.get(publisher.draw.remote(number))
        line.reach(number + 1, note=prompt)
    return ray.get(publisher.publish.remote(planned.subject))


class _Publisher:
    """An actor on a worker's resources: it holds the trained pipelines, draws, and publishes."""

    def __init__(self, store_uri: str, run: RunSpec, checkpoints: Sequence[Checkpoint]) -> None:
        self._store, self._run = SubjectStore(store_uri), run
        self._trained = [
            trained_content(self._store, stage, checkpoint.read())
            for stage, checkpoint in zip(run.cascade, checkpoints, strict=True)
        ]
        self._pipeline = VersionPipeline.of_run(self._store, run, [content for _, content in self._trained])
        self._samples: list[Image.Image] = []

    def draw(self, number: int) -> None:
        """Draw sample `number`; its seed is the run's seed plus its number."""
        self._samples += self._pipeline.draw([self._run.sample_prompts[number]], [self._run.seed + number])

    def publish(self, subject: Subject) -> Version:
        """Write weights, samples and contact sheet, and publish them."""
        run = self._run
        self._pipeline.leave_device()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            manifest = lineage(run, self._store.open_backbone(run.backbone))
            for stage, (form, content) in zip(run.cascade, self._trained, strict=True):
                form.save(content, folder if stage.draws_alone else folder / SUPER_RESOLUTION, stage.backbone)
                of_stage: dict[str, Any] = {"form": form.name, "components": sorted(content.parts)}
                if stage.draws_alone:
                    manifest |= of_stage
                else:
                    family = self._store.open_backbone(stage.backbone).family
                    manifest[SUPER_RESOLUTION] = of_stage | {"backbone": {"family": family, "hash": stage.backbone}}
            if run.upscaling is not None:
                upscaler = self._store.open_backbone(run.upscaling.backbone)
                manifest["upscaler"] = {"backbone": {"family": upscaler.family, "hash": run.upscaling.backbone}}
            (folder / "samples").mkdir()
            for number, image in enumerate(self._samples):
                image.save(folder / "samples" / f"{number:02d}.png")
            sheet = make_contact_sheet(self._store, subject, run, self._samples)
            sheet.save(folder / "contact_sheet.png")
            return self._store.publish(run.subject, run.version, folder, manifest, manifest["components"])


def lineage(run: RunSpec, backbone: Backbone) -> dict[str, Any]:
    """What a version's manifest says of where it comes from."""
    return {
        "class_noun": run.class_noun,
        "identifier": run.identifier,
        "token_ids": list(run.token_ids),
        "phrase": run.phrase,
        "instance_prompt": run.instance_prompt,
        "backbone": {"family": backbone.family, "hash": run.backbone},
        "prior_set": run.prior.key if run.prior else None,
        "instance_images": [{"name": name, "sha256": sha256} for name, sha256 in run.images],
        "samples": [
            {"file": f"samples/{number:02d}.png", "prompt": prompt, "seed": run.seed + number}
            for number, prompt in enumerate(run.sample_prompts)
        ],
        "run": json.loads(json.dumps(dataclasses.asdict(run))),
    }


def make_contact_sheet(store: SubjectStore, subject: Subject, run: RunSpec, samples: list[Any]) -> Any:
    """Instance photos, class-prior images, and samples over their prompts, as one picture."""
    rows = [Row(f"Instance images: {run.instance_prompt}", [image.pixels() for image in subject.images])]
    if run.prior is not None:
        rows.append(Row(f"Class-prior images: {run.class_prompt}", prior_images(store, run.prior, run)))
    rows.append(Row(f"Samples, seed {run.seed} and up", samples, run.sample_prompts))
    return contact_sheet(f"{run.subject}@{run.version}", rows)


def prior_images(store: SubjectStore, prior: PriorSet, run: RunSpec) -> list[Any]:
    """The first few images of the run's class-prior set."""
    count = min(_PRIORS_SHOWN, run.training.prior_images)
    return [read_image(row["png"], row["id"]) for row in prior.rows(store.root, count, ["id", "png"])]
