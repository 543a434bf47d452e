"""A published version as the pipelines that draw with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from dreambooth.backbones import Backbone
from dreambooth.backbones.precision import DTYPES
from dreambooth.methods.textual_inversion import LEARNED_EMBEDS, read_learned_embeds
from dreambooth.sampling.sampler import SamplerSettings, load_pipeline, sample
from dreambooth.store import SubjectStore, Version

SUPER_RESOLUTION = "super_resolution"
"""The folder of a version, and the part of its manifest, that hold a cascade's second stage."""


def published_samplers(version: Version) -> tuple[SamplerSettings, ...]:
    """How the samples that a version was published with were drawn, stage by stage."""
    return tuple(SamplerSettings(**run["samples"]) for run in _runs(version))


def _runs(version: Version) -> list[dict[str, Any]]:
    run = version.manifest["run"]
    return [run] if run[SUPER_RESOLUTION] is None else [run, run[SUPER_RESOLUTION]]


class PublishedModel:
    """The stages of a version on one device; an upscaler, which has learned nothing of the subject, is left out."""

    def __init__(self, store: SubjectStore, version: Version, samplers: Sequence[SamplerSettings]) -> None:
        """Load the version's networks, and its backbones' for the rest."""
        self._samplers = samplers
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        manifests = (version.manifest, version.manifest.get(SUPER_RESOLUTION))
        self._pipelines, self._options = [], []
        for run, manifest, folder, settings in zip(
            _runs(version), manifests, ("", SUPER_RESOLUTION), samplers, strict=False
        ):
            assert manifest is not None
            backbone = store.open_backbone(manifest["backbone"]["hash"])
            parts = _parts(store, version, backbone, manifest["components"], folder, settings)
            self._pipelines.append(load_pipeline(backbone, settings, device, parts))
            low = run["training"]["low_resolution"]
            self._options.append({} if low is None else {"noise_level": low["noise_level"]})

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """One RGB image a prompt, from its seed alone."""
        images: list[Image.Image] = []
        for pipeline, settings, options in zip(self._pipelines, self._samplers, self._options, strict=True):
            images = sample(pipeline, prompts, seeds, settings, images, **options)
        return images


def _parts(
    store: SubjectStore,
    version: Version,
    backbone: Backbone,
    components: Sequence[str],
    subfolder: str,
    settings: SamplerSettings,
) -> dict[str, Any]:
    """What the version has instead of the backbone's, by component name."""
    folder, dtype = store.local_version(version) / subfolder, DTYPES[settings.precision]
    if LEARNED_EMBEDS in components:
        encoders: dict[str, Any] = {name: backbone.load(name, dtype) for name in backbone.text_encoders}
        with torch.no_grad():
            for encoder, token_ids, rows in read_learned_embeds(folder / LEARNED_EMBEDS):
                weight = encoders[encoder].get_input_embeddings().weight
                weight[token_ids] = rows.to(weight)
        return encoders
    own = backbone.trained_parts()
    return own | {name: backbone.load(name, dtype, folder) for name in components if name not in own}
