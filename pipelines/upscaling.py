"""Stage III of a cascade: its samples, enlarged once more by a model that is not trained, and that is not published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from dreambooth.backbones import Upscaler, open_backbone
from dreambooth.sampling import load_pipeline, sample
from dreambooth.store import SubjectStore
from pipelines.options import Options
from pipelines.run import PlannedSubject, Run, Upscaling


def open_upscaler(options: Options) -> Upscaler | None:
    """The upscaler that `options` ask for; raises ValueError when it is none, or has no cascade to end."""
    if options.model.upscaler is None:
        return None
    if options.model.super_resolution is None:
        raise ValueError("--upscaler enlarges what --super-resolution has enlarged: give both, or leave it out")
    upscaler = open_backbone(options.model.upscaler)
    if not isinstance(upscaler, Upscaler):
        raise ValueError(
            f"--upscaler {upscaler.source!r} ({upscaler.family}) is no upscaler: give "
            "stabilityai/stable-diffusion-x4-upscaler, or a folder of its kind"
        )
    return upscaler


def with_upscaling(planned: PlannedSubject, options: Options, upscaler: Upscaler | None) -> PlannedSubject:
    """Let the upscaler, if there is one, end the cascade of the subject's run."""
    if upscaler is None:
        return planned
    before, chosen = planned.run.stages[-1].samples, options.samples
    samples = replace(
        before,
        resolution=before.resolution * upscaler.factor,
        steps=chosen.sample_steps or upscaler.sampler_steps,
        guidance=upscaler.guidance if chosen.sample_guidance is None else chosen.sample_guidance,
    )
    upscaling = Upscaling(upscaler.hash, samples, upscaler.noise_level)
    return replace(planned, run=replace(planned.run, upscaling=upscaling))


class UpscalingStage:
    """The upscaler of a run, ready to draw."""

    def __init__(self, store: SubjectStore, run: Run) -> None:
        """Load its pipeline."""
        assert run.upscaling is not None
        self._run, self._upscaling = run, run.upscaling
        self._backbone = store.open_backbone(run.upscaling.backbone)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._pipeline = load_pipeline(self._backbone, run.upscaling.samples, device)

    def draw(self, prompt: str, seed: int, small: Sequence[Image.Image]) -> list[Image.Image]:
        """The image that the cascade has drawn of a prompt, enlarged.

        It is told of the class alone: to the upscaler the identifier is some other word, if it is any.
        """
        prompt = prompt.replace(self._run.phrase, self._run.class_noun)
        settings, level = self._upscaling.samples, self._upscaling.noise_level
        return sample(self._pipeline, [prompt], [seed], settings, small, noise_level=level)

    def lineage(self) -> dict[str, Any]:
        """What a version's manifest says of it, besides the settings in its run."""
        return {"backbone": {"family": self._backbone.family, "hash": self._upscaling.backbone}}
