"""DeepFloyd IF, a cascade of the Imagen kind in pixel space: stage I draws 64x64 pixels, stage II enlarges them.

Saharia et al., "Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding", NeurIPS 2022. Both
stages hear the same T5 encoder. The U-Nets predict epsilon in the first half of their channels and a variance in the
second; only epsilon is trained, so that a trained U-Net is sampled with a fixed variance.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any

import torch
from diffusers import DDPMScheduler, IFPipeline
from torch import Tensor, nn
from torch.nn.functional import interpolate

from dreambooth.backbones.base import Backbone, LowResolution
from dreambooth.backbones.latents import PixelLatents
from dreambooth.backbones.presets import DDPM, MachinePreset, Preset
from dreambooth.backbones.text import Conditioning, Text, TokenIds
from dreambooth.objectives.variance_preserving import VariancePreserving

_PROMPT_LENGTH = 77
"""Tokens for which IF was trained; T5 itself takes longer texts."""
_AUGMENTATION = 1e-5
"""Variance of the noise on the small image, to which Ruiz et al. lower Imagen's 1e-3 (section 3.4)."""


class T5Text(Text):
    """One T5 text encoder, whose attention leaves out the padding."""

    encoders = ("text_encoder",)
    tokenizer_names = ("tokenizer",)

    @cached_property
    def _cleaner(self) -> Any:
        """A pipeline without parts, for its way with words, which it has without them."""
        return IFPipeline(*[None] * 7, requires_safety_checker=False)

    def clean(self, prompt: str) -> str:
        """Lower-case, without what no caption needs (links, names of files, codes), as a call to the pipeline does."""
        [cleaned] = self._cleaner._text_preprocessing(prompt, clean_caption=True)
        return cleaned

    def length(self, tokenizer: Any) -> int:
        """That for which IF was trained."""
        return _PROMPT_LENGTH

    def encode(self, encoders: Mapping[str, nn.Module], ids: TokenIds) -> Conditioning:
        """T5's last hidden states, (B, length, width); its attention leaves out the padding."""
        tokens = ids["tokenizer"]
        # (B, 1, 1, length), as T5 has it inside: into one of (B, length) it looks, which the meta device forbids.
        mask = (tokens != self.tokenizers["tokenizer"].pad_token_id)[:, None, None, :]
        states = encoders["text_encoder"](tokens, attention_mask=mask).last_hidden_state
        return {"encoder_hidden_states": states}


class DeepFloydIF(Backbone):
    """The family of `IFPipeline`, stage I."""

    family = "deepfloyd-if"
    pipeline_classes = ("IFPipeline",)
    latents_kind = PixelLatents
    text_kind = T5Text
    #                      steps lr    with text batch inversion   priors sampler guidance scheduler
    family_preset = Preset(1000, 1e-7, 5e-8,     4,    3000, 2e-3, 200,   100,    7.0,     DDPM)  # fmt: skip
    machine_presets = {  # noqa: RUF012
        #                       steps lr    batch resolution precision ZeRO offload checkpointing
        "1x24GB": MachinePreset(1000, 1e-7, 4,    64,        "bf16",   2,   "cpu",  False),
        "1x80GB": MachinePreset(1000, 1e-7, 4,    64,        "bf16",   2,   "none", True),
        "8x80GB": MachinePreset(500,  1e-7, 8,    64,        "bf16",   2,   "none", False),
    }  # fmt: skip

    def _pipeline_options(self) -> dict[str, Any]:
        without = dict.fromkeys(("safety_checker", "feature_extractor", "watermarker"))
        return {**without, "requires_safety_checker": False}

    def pipeline(self, dtype: torch.dtype, replacements: Mapping[str, Any] | None = None) -> Any:
        """diffusers' own pipeline, whose `encode_prompt` cleans prompts by default as a call to it does."""
        pipeline = super().pipeline(dtype, replacements)
        pipeline.encode_prompt = partial(pipeline.encode_prompt, clean_caption=True)
        return pipeline

    def trained_parts(self) -> dict[str, Any]:
        """The scheduler, with a fixed variance: that of the U-Net no longer belongs to its epsilon."""
        config = DDPMScheduler.load_config(self.folder, subfolder="scheduler")
        return {"scheduler": DDPMScheduler.from_config(config, variance_type="fixed_small")}

    def predict(self, denoiser: nn.Module, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The U-Net's epsilon, without its variance."""
        said = denoiser(z_t, t, encoder_hidden_states=conditioning["encoder_hidden_states"]).sample
        return said[:, : z_t.shape[1]]


class DeepFloydIFSuperResolution(DeepFloydIF):
    """The family of `IFSuperResolutionPipeline`, stage II."""

    family = "deepfloyd-if-ii"
    pipeline_classes = ("IFSuperResolutionPipeline",)
    #                      steps lr    with text batch inversion   priors sampler guidance scheduler
    family_preset = Preset(1000, 5e-6, 2e-6,     2,    3000, 2e-3, 200,   50,     4.0,     DDPM)  # fmt: skip
    machine_presets = {  # noqa: RUF012
        #                       steps lr    batch resolution precision ZeRO offload checkpointing
        "1x24GB": MachinePreset(1000, 5e-6, 2,    256,       "bf16",   2,   "cpu",  False),
        "1x80GB": MachinePreset(1000, 5e-6, 2,    256,       "bf16",   2,   "none", False),
        "8x80GB": MachinePreset(250,  5e-6, 8,    256,       "bf16",   2,   "none", False),
    }  # fmt: skip

    @cached_property
    def augmentation(self) -> VariancePreserving:
        """The noise on the small image, by level."""
        schedule = VariancePreserving.from_scheduler(self.scheduler_config("image_noising_scheduler"))
        assert schedule is not None, "the noise on the small image is variance-preserving"
        return schedule

    @property
    def default_noise_level(self) -> int:
        """The level whose variance is nearest to the one that Ruiz et al. lower it to."""
        return int((1 - self.augmentation.alphas_cumprod - _AUGMENTATION).abs().argmin())

    def image_conditioning(self, x: Tensor, noise: Tensor, low: LowResolution) -> Conditioning:
        """`upscaled` (B, 3, H, W): x made small, then enlarged and noised as in the pipeline; and `noise_level` (B,).

        x is made small with antialiasing, as the photos are from which stage I learns.
        """
        size = (low.side, low.side)
        small = interpolate(x, size, mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)
        upscaled = interpolate(small, x.shape[-2:], mode="bilinear", align_corners=True)
        level = torch.full((len(x),), low.noise_level, device=x.device)
        return {"upscaled": self.augmentation.add_noise(upscaled, noise, level), "noise_level": level}

    def predict(self, denoiser: nn.Module, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The U-Net's epsilon for z_t beside the enlarged image, without its variance."""
        said = denoiser(
            torch.cat([z_t, conditioning["upscaled"]], dim=1),
            t,
            encoder_hidden_states=conditioning["encoder_hidden_states"],
            class_labels=conditioning["noise_level"],
        ).sample
        return said[:, : z_t.shape[1]]
