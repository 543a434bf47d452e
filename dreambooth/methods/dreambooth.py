"""DreamBooth: the whole denoiser is trained, and the text encoders if asked for."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dreambooth.backbones import Backbone, Conditioning
from dreambooth.backbones.precision import in_precision
from dreambooth.runs import Training


class Trainable(nn.Module):
    """All networks that are trained, as one module for one engine."""

    def __init__(self, backbone: Backbone, networks: dict[str, nn.Module]) -> None:
        """Hold `networks` by component name."""
        super().__init__()
        self.backbone = backbone
        self.networks = nn.ModuleDict(networks)

    def forward(self, z_t: Tensor, t: Tensor, conditioning: Conditioning, ids: dict[str, Tensor]) -> Tensor:
        """The denoiser's prediction; prompts are embeddings, or token ids (B, length) for trained text encoders."""
        if ids:
            encoders = {name: self.networks[name] for name in self.backbone.text_encoders}
            conditioning = conditioning | self.backbone.encode_text(encoders, ids)
        conditioning = in_precision(conditioning, z_t.dtype)
        return self.backbone.predict(self.networks[self.backbone.denoiser], z_t, t, conditioning)


def groups(module: nn.Module, training: Training, backbone: Backbone) -> list[dict[str, Any]]:
    """Parameters for AdamW with their learning rates: text encoders that are trained have one of their own."""
    of_text = tuple(f"networks.{name}." for name in backbone.text_encoders)
    text = [parameter for name, parameter in module.named_parameters() if name.startswith(of_text)]
    others = [parameter for name, parameter in module.named_parameters() if not name.startswith(of_text)]
    rates = [(others, training.learning_rate), (text, training.text_encoder_learning_rate)]
    return [{"params": chosen, "lr": rate, "initial_lr": rate} for chosen, rate in rates if chosen]
