"""Starting points, one line a backbone; every value can be set by hand.

Steps, learning rates and image counts: Stable Diffusion from Ruiz et al. (lr 5e-6, about 1000 iterations) and
diffusers' DreamBooth guide (400-800 steps, 200 class images, 2e-6 with the text encoder); SDXL from practitioners'
full fine-tunes (4e-7 to 2e-6, text encoders frozen), for which nobody publishes a tuned recipe; DeepFloyd IF from
diffusers' DreamBooth guide (IF-I-XL 1e-7, IF-II 5e-6; sampler steps and guidance are its pipelines' own). Textual
Inversion: diffusers' guide (3000 steps, 5e-4 times a batch of 4), for all backbones. Class-prior
images are drawn by an ancestral sampler, in pixel space by the one that keeps pixels within their range.
"""

from __future__ import annotations

from dataclasses import dataclass

from dreambooth.backbones import Backbone


@dataclass(frozen=True)
class Preset:
    """Defaults of a backbone: optimizer steps and learning rates, Textual Inversion's too, and how images are drawn."""

    steps: int
    learning_rate: float
    learning_rate_with_text_encoder: float
    batch: int
    inversion_steps: int
    inversion_learning_rate: float
    prior_images: int
    sampler_steps: int
    guidance: float
    prior_scheduler: str


_EULER, _DDPM = "EulerAncestralDiscreteScheduler", "DDPMScheduler"

PRESETS: dict[str, Preset] = {
    #                          steps lr    with text  batch  inversion   priors  sampler steps  guidance  scheduler
    "embedded":         Preset(150,  1e-4, 2e-5,      4,     300,  5e-3, 64,     20,            5.0,      _EULER),
    "stable-diffusion": Preset(800,  5e-6, 2e-6,      2,     3000, 2e-3, 200,    50,            7.5,      _EULER),
    "sdxl":             Preset(800,  1e-6, 5e-7,      4,     3000, 2e-3, 200,    40,            5.0,      _EULER),
    "deepfloyd-if":     Preset(1000, 1e-7, 5e-8,      4,     3000, 2e-3, 200,    100,           7.0,      _DDPM),
    "deepfloyd-if-ii":  Preset(1000, 5e-6, 2e-6,      2,     3000, 2e-3, 200,    50,            4.0,      _DDPM),
}  # fmt: skip


def preset_of(backbone: Backbone) -> Preset:
    """The preset of the embedded backbone, or else of the backbone's family."""
    return PRESETS["embedded" if backbone.source == "embedded" else backbone.family]
