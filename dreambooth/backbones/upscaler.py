"""The upscaler with which DeepFloyd's cascade ends: Stable Diffusion 2 beside a small, noised image (stage III).

DeepFloyd's own third stage was never published; their chain, and diffusers', takes Stability AI's x4 upscaler.
"""

from __future__ import annotations

from typing import Any, ClassVar

from dreambooth.backbones.stable_diffusion import StableDiffusion


class Upscaler(StableDiffusion):
    """The family of `StableDiffusionUpscalePipeline`. It is never trained: Ruiz et al. tune nothing beyond 256 pixels.

    Its settings are the pipeline's own, but for the noise on the small image, which is that of diffusers' guide to IF.
    """

    family = "stable-diffusion-upscaler"
    pipeline_classes = ("StableDiffusionUpscalePipeline",)
    sampler_steps: ClassVar[int] = 75
    guidance: ClassVar[float] = 9.0
    noise_level: ClassVar[int] = 100

    def _pipeline_options(self) -> dict[str, Any]:
        return dict.fromkeys(("safety_checker", "feature_extractor", "watermarker"))

    @property
    def factor(self) -> int:
        """By how much it enlarges: the small image has the size of the latents."""
        return self.latents.pixels_per_latent
