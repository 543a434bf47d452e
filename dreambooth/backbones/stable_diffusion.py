"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a U-Net that predicts epsilon or v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dreambooth.backbones.base import Backbone
from dreambooth.backbones.presets import EULER, MachinePreset, Preset
from dreambooth.backbones.text import Conditioning, Text, TokenIds


class StableDiffusionText(Text):
    """One CLIP text encoder."""

    encoders = ("text_encoder",)
    tokenizer_names = ("tokenizer",)

    def encode(self, encoders: Mapping[str, nn.Module], ids: TokenIds) -> Conditioning:
        """The last hidden states, (B, length, width)."""
        return {"encoder_hidden_states": encoders["text_encoder"](ids["tokenizer"]).last_hidden_state}


class StableDiffusion(Backbone):
    """The family of `StableDiffusionPipeline`."""

    family = "stable-diffusion"
    pipeline_classes = ("StableDiffusionPipeline",)
    text_kind = StableDiffusionText
    #                      steps lr    with text batch inversion   priors sampler guidance scheduler
    family_preset = Preset(800,  5e-6, 2e-6,     2,    3000, 2e-3, 200,   50,     7.5,     EULER)  # fmt: skip
    machine_presets = {  # noqa: RUF012
        #                       steps lr    batch resolution precision ZeRO offload checkpointing
        "1x24GB": MachinePreset(800,  5e-6, 2,    512,       "bf16",   2,   "none", False),
        "1x80GB": MachinePreset(400,  5e-6, 4,    512,       "bf16",   2,   "none", False),
        "8x80GB": MachinePreset(200,  5e-6, 8,    512,       "bf16",   2,   "none", False),
    }  # fmt: skip

    def _pipeline_options(self) -> dict[str, Any]:
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    def predict(self, denoiser: nn.Module, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The U-Net's prediction."""
        return denoiser(z_t, t, encoder_hidden_states=conditioning["encoder_hidden_states"]).sample
