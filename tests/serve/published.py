"""A store with three small versions, made without training."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dreambooth.backbones import Backbone, open_backbone
from dreambooth.methods.textual_inversion import LEARNED_EMBEDS, LearnedEmbeds
from dreambooth.sampling.sampler import SamplerSettings
from dreambooth.store import SubjectStore, Version

SAMPLES = SamplerSettings(resolution=32, steps=3, guidance=4.0, batch=1, threads=1, precision="fp32")

OLD_MUG, MUG, DOG = ("mug", "1" * 12), ("mug", "2" * 12), ("dog", "3" * 12)
CHANGED = {OLD_MUG: "unet", MUG: "unet", DOG: "text_encoder"}
"""The network that each version changes, oldest version first."""


def publish_all(store: SubjectStore, backbone_folder: Path) -> list[Version]:
    """Publish the versions of `CHANGED`."""
    backbone = open_backbone(backbone_folder)
    store.add_backbone(backbone)
    return [publish(store, backbone, *key, component) for key, component in CHANGED.items()]


def publish(store: SubjectStore, backbone: Backbone, subject: str, version: str, component: str) -> Version:
    """Publish a version of the backbone with noise of its own (by `version`) on every parameter of one network."""
    network: Any = backbone.load(component)
    _add_noise(network, version)
    return _publish(store, backbone, subject, version, component, network)


def publish_learned_embeds(store: SubjectStore, backbone: Backbone, subject: str, version: str) -> Version:
    """Publish a version by Textual Inversion: embeddings of the identifier with noise of their own."""
    encoders = {name: backbone.load(name) for name in backbone.text_encoders}
    embeds = LearnedEmbeds.of_noun(backbone, encoders, "sks", subject)
    _add_noise(embeds, version)
    return _publish(store, backbone, subject, version, LEARNED_EMBEDS, embeds)


def _add_noise(network: nn.Module, version: str) -> None:
    torch.manual_seed(int(version))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def _publish(
    store: SubjectStore, backbone: Backbone, subject: str, version: str, component: str, network: Any
) -> Version:
    lineage = {
        "class_noun": subject,
        "identifier": "sks",
        "phrase": "sks" if component == LEARNED_EMBEDS else f"sks {subject}",
        "backbone": {"family": backbone.family, "hash": backbone.hash},
        "run": {"samples": asdict(SAMPLES)},
    }
    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(Path(folder) / component)
        return store.publish(subject, version, Path(folder), lineage, [component])
