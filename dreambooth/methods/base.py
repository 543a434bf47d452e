"""What a method of personalization is: what it trains of a backbone, from where, and what is published of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
import yaml
from torch import Tensor, nn

from dreambooth.backbones import Backbone
from dreambooth.backbones.presets import MachinePreset

Weights = Callable[[str], Tensor]
"""The float32 value of a parameter or buffer, by its name in a module."""
BaseWeights = Mapping[str, Tensor]
"""The float32 parameters and buffers of a backbone's networks, as `COMPONENT.NAME`."""


@dataclass(frozen=True)
class Defaults:
    """Where a method starts: optimizer steps and learning rate."""

    steps: int
    learning_rate: float


@dataclass(frozen=True)
class Holdings:
    """What training keeps in memory: the shapes of what is trained, and how many parameters are held frozen beside."""

    trained: Sequence[torch.Size]
    frozen: int = 0


class Method(ABC):
    """A method of personalization.

    The module that it makes is called with z_t (B, C, h, w), t (B,), conditioning and token ids, and gives the
    denoiser's prediction (B, C, h, w). All its parameters are trained; what stays frozen is no sub-module of it.
    """

    name: ClassVar[str]
    form: ClassVar[str] = "components"
    """The form of the versions that it publishes, a key of `dreambooth.versions.FORMS`."""
    settings_kind: ClassVar[type | None] = None
    """A frozen dataclass of settings of the method's own, with defaults for all; None when it has none."""
    preserves_prior: ClassVar[bool] = True
    """Whether class-prior images take part."""
    bare_identifier: ClassVar[bool] = False
    """Whether the subject is called [V] alone, without its class noun."""

    # -- planning ------------------------------------------------------------------------------------------------------

    def check(self, *, train_text_encoder: bool, super_resolution: bool) -> None:  # noqa: B027 - most take all
        """Raise ValueError, naming the option, when the method cannot do what is asked."""

    def defaults(self, backbone: Backbone, machine: MachinePreset | None, *, with_text: bool) -> Defaults:
        """Where to start on a backbone, and on a machine if there is a preset for it."""
        preset = backbone.preset
        rate = (machine or preset).learning_rate
        return Defaults((machine or preset).steps, preset.learning_rate_with_text_encoder if with_text else rate)

    def label(self, training: Mapping[str, Any]) -> str:
        """What tables of scores call a version trained with these settings, as far as the paper tells such apart."""
        return f"{self.name}, {training['steps']} steps"

    # -- training ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def trained(self, backbone: Backbone, *, with_text: bool) -> tuple[str, ...]:
        """The networks that are trained whole, by component name."""

    @abstractmethod
    def networks(self, backbone: Backbone, trained: Sequence[str]) -> tuple[str, ...]:
        """The networks through which gradients flow, by component name."""

    def trains_text(self, backbone: Backbone, trained: Sequence[str]) -> bool:
        """Whether the embeddings of prompts change while training."""
        return any(name in trained for name in backbone.text_encoders)

    @abstractmethod
    def module(
        self,
        backbone: Backbone,
        networks: Mapping[str, nn.Module],
        *,
        identifier: str,
        class_noun: str,
        settings: Any = None,
    ) -> nn.Module:
        """What is trained, around `networks`, which have shapes and no storage yet (torch's meta device)."""

    @abstractmethod
    def start(self, module: nn.Module, base: BaseWeights) -> Weights:
        """The values from which the module's parameters and buffers start."""

    def frozen(self, module: nn.Module) -> Mapping[str, nn.Module]:
        """The networks that the module holds frozen, by component name; they have no storage yet."""
        return {}

    @abstractmethod
    def parameter_groups(
        self, backbone: Backbone, module: nn.Module, learning_rate: float, text_encoder_learning_rate: float
    ) -> list[dict[str, Any]]:
        """The optimizer's groups: `params`, `lr` and `initial_lr` of each."""

    @abstractmethod
    def holdings(self, backbone: Backbone, networks: Mapping[str, Any]) -> Holdings:
        """What training keeps of `networks`; leaves gradients required of the parameters to which they flow."""


def parameter_group(parameters: Sequence[nn.Parameter], rate: float) -> dict[str, Any]:
    """Parameters with their learning rate, which schedules go by."""
    return {"params": list(parameters), "lr": rate, "initial_lr": rate}


def parse_settings(method: Method, given: Sequence[str]) -> Any:
    """The method's settings from texts like `rank=8`, defaults for the rest; None when it has no settings.

    Raises ValueError, naming the setting, when the method has no such one or its value is of another type.
    """
    known = {} if method.settings_kind is None else {one.name: one for one in fields(method.settings_kind)}
    values = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--method-settings takes NAME=VALUE, not {text!r}")
        if name not in known:
            has = f"its settings are {', '.join(known)}" if known else "it has none of its own"
            raise ValueError(f"--method-settings {text}: {method.name} has no setting {name!r}; {has}")
        values[name] = yaml.safe_load(value)
        wanted = type(known[name].default)
        if wanted is float and type(values[name]) is int:
            values[name] = float(values[name])
        if type(values[name]) is not wanted:
            raise ValueError(f"--method-settings {text}: {name} is of type {wanted.__name__}")
    return None if method.settings_kind is None else method.settings_kind(**values)
