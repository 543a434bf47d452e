"""Does the backbone take a new subject? DreamBooth on every held-out subject, one preset for all, judged.

The plain loop of the paper on one device; the distributed one is in `pipelines`, on the same loss.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dreambooth.backbones import Backbone, open_backbone
from dreambooth.common.contact_sheet import Row, contact_sheet
from dreambooth.embedded import subjects_path
from dreambooth.embedded.build.config import PersonalizationConfig
from dreambooth.embedded.vocabulary import CONTEXTS, HELD_OUT
from dreambooth.metrics.embedded import EmbeddedClip, EmbeddedDino
from dreambooth.objectives import VariancePreserving
from dreambooth.objectives.losses import prior_preservation_loss
from dreambooth.sampling.sampler import SamplerSettings, sample, to_pixels
from dreambooth.subjects.crops import centre_view
from dreambooth.subjects.identifier import find_identifier
from dreambooth.subjects.prompts import class_prompt, fill, instance_prompt

SEED = 7
SCENES = ("jungle", "snow", "beach", "fabric", "city", "house", "water", "night")
"""Contexts that are drawn, none of which the subjects' photos show."""


@dataclass(frozen=True)
class Outcome:
    """Mean similarities by `embedded-dino` to the subject's photos, and the share of right contexts."""

    real: float
    prior: float
    subject: float
    context: float

    @property
    def gain(self) -> float:
        """How far the samples came from the class prior (0) to the real photos (1)."""
        return (self.subject - self.prior) / (self.real - self.prior)


@dataclass(frozen=True)
class Tools:
    """What all subjects share."""

    backbone: Backbone
    pipeline: Any
    clip: EmbeddedClip
    dino: EmbeddedDino
    config: PersonalizationConfig
    device: torch.device

    @property
    def settings(self) -> SamplerSettings:
        """How every image is drawn."""
        side = self.backbone.default_resolution
        return SamplerSettings(side, self.config.sampler_steps, self.config.guidance, 16, 1, "fp32")


def personalize_all(weights: Path, config: PersonalizationConfig, out: Path, device: torch.device) -> dict[str, float]:
    """Personalize every held-out subject; write a contact sheet each into `out` and return the mean figures."""
    backbone = open_backbone(weights / "backbone")
    tools = Tools(
        backbone,
        backbone.pipeline(torch.float32).to(device),
        EmbeddedClip(weights / "judges" / "embedded-clip", device),
        EmbeddedDino(weights / "judges" / "embedded-dino", device),
        config,
        device,
    )
    out.mkdir(parents=True, exist_ok=True)
    outcomes = {}
    for name in sorted(HELD_OUT)[: config.subjects]:
        outcome, sheet = personalize(name, tools)
        outcomes[name] = outcome
        sheet.save(out / f"{name}.png")
        print(f"{name}: {outcome} gain {outcome.gain:.2f}", flush=True)
    fields = ("real", "prior", "subject", "gain", "context")
    means = {f"personal_{f}": float(np.mean([getattr(o, f) for o in outcomes.values()])) for f in fields}
    return means | {"personal_subjects": len(outcomes)}


def personalize(name: str, tools: Tools) -> tuple[Outcome, Image.Image]:
    """Fine-tune a copy of the U-Net on one held-out subject, draw it in `SCENES`, and judge what came."""
    noun = HELD_OUT[name][0]
    photos = [Image.open(path).convert("RGB") for path in sorted((subjects_path() / name).glob("*.png"))]
    identifier = find_identifier(list(tools.backbone.text.tokenizers.values()), seed=SEED, subject=name).text
    count = tools.config.prior_images
    prior = sample(tools.pipeline, [class_prompt(noun)] * count, [*range(count)], tools.settings)
    pipeline = copy.copy(tools.pipeline)
    pipeline.unet = _finetune(photos, prior, identifier, noun, tools)

    words = {context: f"a {{subject}} {CONTEXTS[context]}" for context in SCENES}
    prompts = [fill(template, f"{identifier} {noun}") for template in words.values()]
    each = tools.config.images_a_prompt
    drawn = sample(pipeline, prompts * each, [*range(1000, 1000 + len(prompts) * each)], tools.settings)

    real, samples, others = (tools.dino.embed_images(images) for images in (photos, drawn, prior))
    pairs = real @ real.T
    options = [f"a {noun} {place}" for place in CONTEXTS.values()]
    chosen = tools.clip.choose(drawn, options)
    truths = [list(CONTEXTS).index(context) for context in SCENES] * each
    outcome = Outcome(
        real=float((pairs.sum() - pairs.trace()) / (len(real) * (len(real) - 1))),
        prior=float((others @ real.T).mean()),
        subject=float((samples @ real.T).mean()),
        context=float(np.mean([one == truth for one, truth in zip(chosen, truths, strict=True)])),
    )
    rows = [
        Row("the subject", photos),
        Row(f"the class prior: {class_prompt(noun)}", prior[:8]),
        Row("in new scenes", drawn[: len(SCENES)], prompts),
    ]
    return outcome, contact_sheet(f"{name}: {instance_prompt(f'{identifier} {noun}')}", rows, columns=8)


def _finetune(
    photos: list[Image.Image], prior: list[Image.Image], identifier: str, noun: str, tools: Tools
) -> nn.Module:
    """Eq. 2 of the paper on half a batch of photos and half a batch of class-prior images, the text frozen."""
    backbone, device = tools.backbone, tools.device
    side = backbone.default_resolution
    views = [centre_view((photo.height, photo.width), (side, side)) for photo in photos]
    mine = _encode(tools, [view.show(photo) for view, photo in zip(views, photos, strict=True)])
    others = _encode(tools, prior)
    conditions = [backbone.size_conditioning(view.original, view.corner, view.bucket) for view in views]
    conditions += [backbone.size_conditioning((side, side), (0, 0), (side, side))] * len(prior)
    time_ids = torch.stack([condition["time_ids"] for condition in conditions]).to(device)
    encoders = {encoder: getattr(tools.pipeline, encoder) for encoder in backbone.text_encoders}
    ids = backbone.text.tokenize([instance_prompt(f"{identifier} {noun}"), class_prompt(noun)])
    with torch.no_grad():
        text = backbone.text.encode(encoders, {key: value.to(device) for key, value in ids.items()})

    unet = copy.deepcopy(tools.pipeline.unet).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=tools.config.lr, weight_decay=0.01)
    generator = torch.Generator(device).manual_seed(SEED)
    half, schedule = tools.config.batch, backbone.objective
    assert isinstance(schedule, VariancePreserving)
    which = torch.tensor([0] * half + [1] * half, device=device)
    for _ in range(tools.config.steps):
        rows = torch.cat(
            [
                torch.randint(len(mine), (half,), generator=generator, device=device),
                len(mine) + torch.randint(len(others), (half,), generator=generator, device=device),
            ]
        )
        latents = torch.cat([mine, others])[rows]
        noise = torch.randn(latents.shape, generator=generator, device=device)
        t = torch.randint(schedule.steps, (2 * half,), generator=generator, device=device)
        conditioning = {key: value[which] for key, value in text.items()} | {"time_ids": time_ids[rows]}
        predicted = backbone.predict(unet, schedule.add_noise(latents, noise, t), t, conditioning)
        halves = (each.split(half) for each in (predicted, schedule.target(latents, noise, t), schedule.weight(t)))
        prior_preservation_loss(*halves, prior_weight=1.0).total.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return unet.eval().requires_grad_(False)


def _encode(tools: Tools, images: list[Image.Image]) -> Tensor:
    mean, _ = tools.backbone.latents.encode(tools.pipeline.components, to_pixels(images).to(tools.device))
    return tools.backbone.latents.scale(mean)
