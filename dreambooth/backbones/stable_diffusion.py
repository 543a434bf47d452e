"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a U-Net that predicts epsilon or v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dreambooth.backbones.base import Backbone, Conditioning, TokenIds


class StableDiffusion(Backbone):
    """The family of `StableDiffusionPipeline`."""

    family = "stable-diffusion"
    pipeline_classes = ("StableDiffusionPipeline",)
    text_encoders = ("text_encoder",)
    tokenizer_names = ("tokenizer",)

    def _pipeline_options(self) -> dict[str, Any]:
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    def encode_text(self, encoders: Mapping[str, nn.Module], ids: TokenIds) -> Conditioning:
        """The last hidden states, (B, length, width)."""
        encoder = encoders["text_encoder"]
        return {"encoder_hidden_states": encoder(ids["tokenizer"]).last_hidden_state}

    def predict(self, denoiser: nn.Module, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The U-Net's prediction."""
        return denoiser(z_t, t, encoder_hidden_states=conditioning["encoder_hidden_states"]).sample
