"""SDXL: two text encoders, a pooled embedding, and micro-conditioning on each image's size and crop.

Podell et al., "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis", ICLR 2024, section 2.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.backbones.base import Backbone
from dreambooth.backbones.presets import EULER, MachinePreset, Preset
from dreambooth.backbones.text import Conditioning, Text, TokenIds


class SDXLText(Text):
    """Two CLIP text encoders."""

    encoders = ("text_encoder", "text_encoder_2")
    tokenizer_names = ("tokenizer", "tokenizer_2")

    def encode(self, encoders: Mapping[str, nn.Module], ids: TokenIds) -> Conditioning:
        """Both encoders' penultimate states side by side, (B, length, width), and the second's pooled (B, width)."""
        states = []
        for encoder_name, tokenizer_name in zip(self.encoders, self.tokenizer_names, strict=True):
            output = encoders[encoder_name](ids[tokenizer_name], output_hidden_states=True)
            states.append(output.hidden_states[-2])
        return {"encoder_hidden_states": torch.cat(states, dim=-1), "text_embeds": output.text_embeds}


class SDXL(Backbone):
    """The family of `StableDiffusionXLPipeline`."""

    family = "sdxl"
    pipeline_classes = ("StableDiffusionXLPipeline",)
    text_kind = SDXLText
    #                      steps lr    with text batch inversion   priors sampler guidance scheduler
    family_preset = Preset(800,  1e-6, 5e-7,     4,    3000, 2e-3, 200,   40,     5.0,     EULER)  # fmt: skip
    machine_presets = {  # noqa: RUF012
        #                       steps lr    batch resolution precision ZeRO offload checkpointing
        "1x24GB": MachinePreset(800,  1e-6, 4,    1024,      "bf16",   2,   "cpu",  True),
        "1x80GB": MachinePreset(800,  1e-6, 4,    1024,      "bf16",   2,   "none", True),
        "8x80GB": MachinePreset(400,  1e-6, 8,    1024,      "bf16",   2,   "none", False),
    }  # fmt: skip

    def _pipeline_options(self) -> dict[str, Any]:
        return {"add_watermarker": False}

    def size_conditioning(
        self,
        original_size: tuple[int, int],
        crop_top_left: tuple[int, int],
        target_size: tuple[int, int],
    ) -> Conditioning:
        """`time_ids`: the six numbers in SDXL's order, (6,)."""
        return {"time_ids": torch.tensor([*original_size, *crop_top_left, *target_size], dtype=torch.float32)}

    def predict(self, denoiser: nn.Module, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The U-Net's prediction."""
        added = {name: conditioning[name] for name in ("text_embeds", "time_ids")}
        return denoiser(
            z_t, t, encoder_hidden_states=conditioning["encoder_hidden_states"], added_cond_kwargs=added
        ).sample
