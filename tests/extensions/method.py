"""A method: of the denoiser, only the weights whose names hold a word are trained; all others stay frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dreambooth.backbones import Backbone, Conditioning, TokenIds
from dreambooth.backbones.precision import in_precision
from dreambooth.methods.base import BaseWeights, Holdings, Method, Weights, parameter_group


@dataclass(frozen=True)
class Settings:
    """Which weights are trained."""

    word: str = "attn2"


class SomeWeights(nn.Module):
    """Some weights of a denoiser, `weights.NAME` with `/` for `.`, and the rest of it beside."""

    def __init__(self, backbone: Backbone, denoiser: nn.Module, word: str) -> None:
        super().__init__()
        self.backbone = backbone
        chosen = {name: value for name, value in denoiser.named_parameters() if word in name}
        self.weights = nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(value.detach().clone()) for name, value in chosen.items()}
        )
        self.frozen = {backbone.denoiser: denoiser.requires_grad_(False)}

    def forward(self, z_t: Tensor, t: Tensor, conditioning: Conditioning, ids: TokenIds) -> Tensor:
        assert not ids
        values = {name.replace("/", "."): value for name, value in self.weights.items()}
        denoiser = self.frozen[self.backbone.denoiser]
        conditioning = in_precision(conditioning, z_t.dtype)
        return self.backbone.predict(_With(denoiser, values), z_t, t, conditioning)


class _With(nn.Module):
    """A network that is called with other values of some parameters."""

    def __init__(self, network: nn.Module, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._call = lambda *args, **kwargs: functional_call(network, dict(values), args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


class Partial(Method):
    """Partial fine-tuning."""

    name = "partial"
    form = "differences"
    settings_kind = Settings

    def trained(self, backbone: Backbone, *, with_text: bool) -> tuple[str, ...]:
        return ()

    def networks(self, backbone: Backbone, trained: Sequence[str]) -> tuple[str, ...]:
        return (backbone.denoiser,)

    def module(
        self,
        backbone: Backbone,
        networks: Mapping[str, nn.Module],
        *,
        identifier: str,
        class_noun: str,
        settings: Any = None,
    ) -> nn.Module:
        return SomeWeights(backbone, networks[backbone.denoiser], settings.word)

    def start(self, module: nn.Module, base: BaseWeights) -> Weights:
        assert isinstance(module, SomeWeights)
        denoiser = module.backbone.denoiser
        return lambda name: base[f"{denoiser}.{name.removeprefix('weights.').replace('/', '.')}"]

    def frozen(self, module: nn.Module) -> Mapping[str, nn.Module]:
        assert isinstance(module, SomeWeights)
        return module.frozen

    def parameter_groups(
        self, backbone: Backbone, module: nn.Module, learning_rate: float, text_encoder_learning_rate: float
    ) -> list[dict[str, Any]]:
        return [parameter_group(list(module.parameters()), learning_rate)]

    def holdings(self, backbone: Backbone, networks: Mapping[str, Any]) -> Holdings:
        shapes = [parameter.shape for parameter in networks[backbone.denoiser].parameters()]
        return Holdings(shapes, frozen=sum(map(torch.Size.numel, shapes)))
