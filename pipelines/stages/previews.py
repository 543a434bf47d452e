"""Samples of checkpoints during training, by an actor of its own: training never waits for them."""

from __future__ import annotations

import io
import time
from dataclasses import replace
from typing import Any

import numpy as np
import ray
from PIL import Image
from ray.exceptions import RayError

from dreambooth.common.contact_sheet import Row, contact_sheet
from dreambooth.common.location import Location
from dreambooth.runs import RunSpec
from dreambooth.store import SubjectStore
from pipelines.runtime.console import Display
from pipelines.training.checkpoints import Checkpoint, last_checkpoint

_SECONDS_BETWEEN_LOOKS = 2.0


class PreviewSampler:
    """An actor with the resources of a training worker; where the cluster has none to spare it never starts."""

    def __init__(self, store_uri: str, run: RunSpec) -> None:
        """Draw nothing yet."""
        self._store, self._run = SubjectStore(store_uri), run
        self._seen = 0

    def draw(self) -> tuple[int, bytes]:
        """Wait for a checkpoint that is new, and draw the run's sample prompts with it: its step, and a PNG file."""
        from dreambooth.versions.pipeline import VersionPipeline, trained_content

        found = self._next_checkpoint()
        alone = replace(self._run, super_resolution=None, upscaling=None)
        _, content = trained_content(self._store, alone, found.read())
        pipeline, prompts = VersionPipeline.of_run(self._store, alone, [content]), self._run.sample_prompts
        drawn = pipeline.draw(prompts, [self._run.seed + number for number in range(len(prompts))])
        file = io.BytesIO()
        title = f"{self._run.subject}@{self._run.version}, step {found.step} of {self._run.training.steps}"
        contact_sheet(title, [Row("Samples", drawn, prompts)]).save(file, "PNG")
        return found.step, file.getvalue()

    def _next_checkpoint(self) -> Checkpoint:
        while (found := last_checkpoint(self._store, self._run)) is None or found.step <= self._seen:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        self._seen = found.step
        return found


class Previews:
    """The driver's side: takes previews as they come, to `runs/KEY/previews/STEP.png` and TensorBoard."""

    def __init__(self, store: SubjectStore, run: RunSpec, display: Display) -> None:
        """Start the actor."""
        self._display = display
        self._folder: Location = store.root / "runs" / run.key / "previews"
        resources = {"num_cpus": run.lane.cpus_per_worker, "num_gpus": run.lane.gpus_per_worker or None}
        self._sampler: Any = ray.remote(PreviewSampler).options(**resources).remote(store.root.uri, run)
        self._next: list[Any] = [self._sampler.draw.remote()]

    def take(self, writer: Any) -> None:
        """Write the preview that is ready, if one is."""
        ready, _ = ray.wait(self._next, timeout=0) if self._next else ([], [])
        for preview in ready:
            try:
                step, png = ray.get(preview)
            except RayError as error:
                self._display.say(f"no more previews: {error}")
                self._next = []
                return
            (self._folder / f"{step:06d}.png").write_bytes(png)
            writer.add_image("samples", np.asarray(Image.open(io.BytesIO(png))), step, dataformats="HWC")
            self._next = [self._sampler.draw.remote()]

    def close(self) -> None:
        """Stop the actor, whatever it draws."""
        ray.kill(self._sampler)
