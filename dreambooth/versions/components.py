"""Whole components: the trained networks in diffusers' own layout, which its pipelines load as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dreambooth.backbones import Backbone
from dreambooth.versions.base import Content, Files, State, VersionForm


class Components(VersionForm):
    """The trained networks, each whole, and what a trained denoiser needs besides itself."""

    name = "components"

    def components(self, family: type[Backbone]) -> set[str]:
        """Any network of the backbone."""
        return {family.denoiser, *family.latents_kind.networks, *family.text_kind.encoders}

    def build(
        self, backbone: Backbone, state: State, *, trained: Sequence[str], identifier: str, dtype: torch.dtype
    ) -> Content:
        """The backbone's networks with the parameters `networks.COMPONENT.NAME` of the state."""
        networks = {name: trained_network(backbone, name, state, dtype) for name in trained}
        parts = networks | backbone.trained_parts()
        return Content(parts, parts)

    def load(
        self, folder: Path, backbone: Backbone, components: Sequence[str], dtype: torch.dtype
    ) -> Mapping[str, Any]:
        """The networks of the folder."""
        own = backbone.trained_parts()
        return own | {name: backbone.load(name, dtype, folder) for name in components if name not in own}

    def most_bytes(self, components: Sequence[str], files: Files, base: Mapping[str, Tensor]) -> int:
        """All tensors of the components."""
        prefixes = tuple(f"{component}." for component in components)
        return sum(tensor.nbytes for name, tensor in base.items() if name.startswith(prefixes))

    def changes(
        self, folder: Path, components: Sequence[str], files: Files, base: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """All tensors of the components' safetensors files."""
        for component in components:
            weights = [name for name in files if name.startswith(f"{component}/") and name.endswith(".safetensors")]
            if not weights:
                raise ValueError(f"holds no {component}/*.safetensors")
            for path in weights:
                with safe_open(folder / path, "pt") as file:
                    for name in file.keys():  # noqa: SIM118 - not a mapping
                        yield f"{component}.{name}", file.get_tensor(name)


def trained_network(backbone: Backbone, component: str, state: State, dtype: torch.dtype) -> nn.Module:
    """A network of the backbone with the parameters of a state, on the CPU in `dtype`."""
    network = backbone.load(component)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(state[f"networks.{component}.{name}"])
    return network.to(dtype)
