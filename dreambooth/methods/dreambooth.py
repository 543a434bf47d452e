"""DreamBooth: the whole denoiser is trained, and the text encoders if asked for (Ruiz et al., CVPR 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dreambooth.backbones import Backbone, Conditioning, TokenIds
from dreambooth.backbones.precision import in_precision
from dreambooth.methods.base import BaseWeights, Holdings, Method, Weights, parameter_group


class Trainable(nn.Module):
    """All networks that are trained, as one module for one engine."""

    def __init__(self, backbone: Backbone, networks: Mapping[str, nn.Module]) -> None:
        """Hold `networks` by component name."""
        super().__init__()
        self.backbone = backbone
        self.networks = nn.ModuleDict(networks)

    def forward(self, z_t: Tensor, t: Tensor, conditioning: Conditioning, ids: TokenIds) -> Tensor:
        """The denoiser's prediction; prompts are embeddings, or token ids (B, length) for trained text encoders."""
        if ids:
            encoders = {name: self.networks[name] for name in self.backbone.text_encoders}
            conditioning = conditioning | self.backbone.text.encode(encoders, ids)
        conditioning = in_precision(conditioning, z_t.dtype)
        return self.backbone.predict(self.networks[self.backbone.denoiser], z_t, t, conditioning)


class DreamBooth(Method):
    """Full fine-tuning, with the prior-preservation loss."""

    name = "dreambooth"

    def label(self, training: Mapping[str, Any]) -> str:
        """The paper's name, and what its ablations change."""
        parts = ["DreamBooth", f"{training['steps']} steps"]
        if not training["prior_weight"]:
            parts.append("no prior term")
        elif training["prior_kind"] != "images":
            parts.append(f"prior by {training['prior_kind']}")
        if training.get("bare_identifier"):  # versions of before this was an option do not have it
            parts.append("no class noun")
        if any(name.startswith("text_encoder") for name in training["trained"]):
            parts.append("text trained")
        return ", ".join(parts)

    def trained(self, backbone: Backbone, *, with_text: bool) -> tuple[str, ...]:
        """The denoiser, and the text encoders if asked for."""
        return (backbone.denoiser, *(backbone.text_encoders if with_text else ()))

    def networks(self, backbone: Backbone, trained: Sequence[str]) -> tuple[str, ...]:
        """Those that are trained."""
        return tuple(trained)

    def module(
        self,
        backbone: Backbone,
        networks: Mapping[str, nn.Module],
        *,
        identifier: str,
        class_noun: str,
        settings: Any = None,
    ) -> nn.Module:
        """The networks side by side, `networks.COMPONENT.NAME`."""
        return Trainable(backbone, networks)

    def start(self, module: nn.Module, base: BaseWeights) -> Weights:
        """The backbone's own weights."""
        return lambda name: base[name.removeprefix("networks.")]

    def parameter_groups(
        self, backbone: Backbone, module: nn.Module, learning_rate: float, text_encoder_learning_rate: float
    ) -> list[dict[str, Any]]:
        """The denoiser's parameters, and those of text encoders at a learning rate of their own."""
        of_text = tuple(f"networks.{name}." for name in backbone.text_encoders)
        text = [parameter for name, parameter in module.named_parameters() if name.startswith(of_text)]
        others = [parameter for name, parameter in module.named_parameters() if not name.startswith(of_text)]
        groups = ((others, learning_rate), (text, text_encoder_learning_rate))
        return [parameter_group(chosen, rate) for chosen, rate in groups if chosen]

    def holdings(self, backbone: Backbone, networks: Mapping[str, Any]) -> Holdings:
        """All parameters of the networks."""
        return Holdings([parameter.shape for network in networks.values() for parameter in network.parameters()])
