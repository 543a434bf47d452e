"""A subject's pipelines: what draws with a version, published or just trained, stage after stage of a cascade."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from dreambooth.backbones import Backbone
from dreambooth.backbones.precision import DTYPES
from dreambooth.methods import METHODS
from dreambooth.runs import RunSpec, Upscaling
from dreambooth.sampling.sampler import SamplerSettings, load_pipeline, sample
from dreambooth.store import SubjectStore, Version
from dreambooth.versions import FORMS, VersionForm, form_of
from dreambooth.versions.base import Content, State

SUPER_RESOLUTION = "super_resolution"
"""The folder of a version, and the part of its manifest, that hold a cascade's second stage."""


@dataclass(frozen=True)
class PipelineStage:
    """A stage of a cascade: diffusers' pipeline, how it is called, and the part of prompts that it does not know."""

    pipeline: Any
    settings: SamplerSettings
    options: Mapping[str, Any]
    unknown: tuple[str, str] | None = None
    """A phrase, and what takes its place."""

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], small: Sequence[Image.Image] = ()
    ) -> list[Image.Image]:
        """One RGB image a prompt; a stage that enlarges takes the images `small` of the stage before."""
        known = [prompt.replace(*self.unknown) for prompt in prompts] if self.unknown else prompts
        return sample(self.pipeline, known, seeds, self.settings, small, **self.options)


class VersionPipeline:
    """Draws images of a subject."""

    def __init__(self, stages: Sequence[PipelineStage]) -> None:
        """Draw by these stages; `of_run` and `of_version` make them."""
        self._stages = stages

    @classmethod
    def of_run(cls, store: SubjectStore, run: RunSpec, contents: Sequence[Content]) -> VersionPipeline:
        """Of what a run has trained: the content of each stage of its cascade, and the upscaler if it has one."""
        stages = []
        for stage, content in zip(run.cascade, contents, strict=True):
            backbone = store.open_backbone(stage.backbone)
            low = stage.training.low_resolution
            options = {} if low is None else {"noise_level": low.noise_level}
            stages.append(
                PipelineStage(_pipeline(backbone, stage.samples, content.replacements), stage.samples, options)
            )
        return cls([*stages, *([upscaling_stage(store, run, run.upscaling)] if run.upscaling else [])])

    @classmethod
    def of_version(cls, store: SubjectStore, version: Version, samplers: Sequence[SamplerSettings]) -> VersionPipeline:
        """Of a published version, drawn by `samplers`; an upscaler, which has learned nothing, is left out."""
        stages = []
        manifests = (version.manifest, version.manifest.get(SUPER_RESOLUTION))
        folders = ("", SUPER_RESOLUTION)
        for run, manifest, folder, settings in zip(_runs(version), manifests, folders, samplers, strict=False):
            assert manifest is not None
            backbone = store.open_backbone(manifest["backbone"]["hash"])
            local = store.local_version(version) / folder
            parts = form_of(manifest).load(local, backbone, manifest["components"], DTYPES[settings.precision])
            low = run["training"]["low_resolution"]
            options = {} if low is None else {"noise_level": low["noise_level"]}
            stages.append(PipelineStage(_pipeline(backbone, settings, parts), settings, options))
        return cls(stages)

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """One RGB image a prompt, from its seed alone."""
        images: list[Image.Image] = []
        for stage in self._stages:
            images = stage.draw(prompts, seeds, images)
        return images

    def leave_device(self) -> None:
        """Bring all networks to the CPU, to be saved."""
        for stage in self._stages:
            stage.pipeline.to("cpu")


def upscaling_stage(store: SubjectStore, run: RunSpec, upscaling: Upscaling) -> PipelineStage:
    """The upscaler that ends a run's cascade.

    It is told of the class alone: to it the identifier is some other word, if it is any.
    """
    pipeline = _pipeline(store.open_backbone(upscaling.backbone), upscaling.samples)
    options = {"noise_level": upscaling.noise_level}
    return PipelineStage(pipeline, upscaling.samples, options, (run.phrase, run.class_noun))


def trained_content(store: SubjectStore, run: RunSpec, state: State) -> tuple[VersionForm, Content]:
    """What a stage of a run has trained, by the state of a checkpoint, and the form in which it is published.

    Of a parameter with a moving average, as a final checkpoint holds it, the average is taken.
    """
    method, training = METHODS[run.training.method], run.training
    form = FORMS[method.form]
    trained = {
        name.removeprefix("param."): state.get(name.replace("param.", "average.", 1), value)
        for name, value in state.items()
        if name.startswith("param.")
    }
    content = form.build(
        store.open_backbone(run.backbone),
        trained,
        trained=training.trained,
        identifier=run.identifier,
        dtype=DTYPES[training.precision],
    )
    return form, content


def published_samplers(version: Version) -> tuple[SamplerSettings, ...]:
    """How the samples that a version was published with were drawn, stage by stage."""
    return tuple(SamplerSettings(**run["samples"]) for run in _runs(version))


def _runs(version: Version) -> list[dict[str, Any]]:
    run = version.manifest["run"]
    return [run] if run[SUPER_RESOLUTION] is None else [run, run[SUPER_RESOLUTION]]


def _pipeline(backbone: Backbone, settings: SamplerSettings, replacements: Mapping[str, Any] | None = None) -> Any:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return load_pipeline(backbone, settings, device, replacements)
