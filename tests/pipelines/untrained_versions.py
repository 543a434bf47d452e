"""Versions as runs publish them, whose weights are the backbone's with noise: no training, no Ray."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from dreambooth.methods.textual_inversion import LEARNED_EMBEDS, LearnedEmbeds
from dreambooth.store import SubjectStore, Version
from pipelines.planning.options import parse
from pipelines.planning.plan import make_plan
from pipelines.stages.publish import lineage


def publish_untrained(store: SubjectStore, photos: Path, backbone: Path, *arguments: object, noise: int = 1) -> Version:
    """Plan the run of these options and publish its version."""
    options = ["--images", photos, "--class-noun", "mug", "--backbone", backbone, "--store", store.root.uri]
    plan = make_plan(parse([str(argument) for argument in (*options, *arguments)], ""))
    [planned] = plan.subjects
    run = planned.run
    store.add_backbone(plan.backbone)
    store.claim_identifier(run.subject, run.identifier)
    part: Any
    if run.training.method == "textual-inversion":
        name = LEARNED_EMBEDS
        encoders = {encoder: plan.backbone.load(encoder) for encoder in plan.backbone.text_encoders}
        part = LearnedEmbeds.of_noun(plan.backbone, encoders, run.identifier, "mug")
    else:
        name = plan.backbone.denoiser
        part = plan.backbone.load(name)
    torch.manual_seed(noise)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    with tempfile.TemporaryDirectory() as folder:
        part.save_pretrained(Path(folder) / name)
        return store.publish(run.subject, run.version, Path(folder), lineage(run, plan.backbone), [name])
