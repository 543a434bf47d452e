"""A family: Stable Diffusion's networks under perturbed-attention guidance, another of diffusers' pipelines."""

from __future__ import annotations

from typing import Any

from dreambooth.backbones.presets import EULER, Preset
from dreambooth.backbones.stable_diffusion import StableDiffusion


class PerturbedAttention(StableDiffusion):
    """The family of `StableDiffusionPAGPipeline`."""

    family = "perturbed-attention"
    pipeline_classes = ("StableDiffusionPAGPipeline",)
    #                      steps lr    with text batch inversion   priors sampler guidance scheduler
    family_preset = Preset(7,    1e-3, 1e-4,     2,    9,    5e-3, 4,     2,      3.0,     EULER)  # fmt: skip
    machine_presets = {}  # noqa: RUF012

    def _pipeline_options(self) -> dict[str, Any]:
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
