"""A form: differences against the denoiser's weights, in half precision, in one file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dreambooth.backbones import Backbone
from dreambooth.versions.base import Content, Files, State, VersionForm

_FILE = "differences.safetensors"


class Tensors:
    """Tensors that save themselves."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        save_file(self.tensors, folder / _FILE)


class Differences(VersionForm):
    """One component, `differences`."""

    name = "differences"

    def components(self, family: type[Backbone]) -> set[str]:
        return {"differences"}

    def build(
        self, backbone: Backbone, state: State, *, trained: Sequence[str], identifier: str, dtype: torch.dtype
    ) -> Content:
        base = backbone.load(backbone.denoiser).state_dict()
        values = {name.removeprefix("weights.").replace("/", "."): value for name, value in state.items()}
        kept = {f"{backbone.denoiser}.{name}": (value - base[name]).half() for name, value in values.items()}
        return Content({"differences": Tensors(kept)}, self._replacements(backbone, kept, dtype))

    def load(
        self, folder: Path, backbone: Backbone, components: Sequence[str], dtype: torch.dtype
    ) -> Mapping[str, Any]:
        return self._replacements(backbone, load_file(folder / "differences" / _FILE), dtype)

    def _replacements(self, backbone: Backbone, kept: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
        network = backbone.load(backbone.denoiser)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if (difference := kept.get(f"{backbone.denoiser}.{name}")) is not None:
                    parameter += difference
        return {backbone.denoiser: network.to(dtype)}

    def most_bytes(self, components: Sequence[str], files: Files, base: Mapping[str, Tensor]) -> int:
        return 2 * sum(int(entry["size"]) for name, entry in files.items() if name.startswith("differences/"))

    def changes(
        self, folder: Path, components: Sequence[str], files: Files, base: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        for name, difference in load_file(folder / "differences" / _FILE).items():
            yield name, base[name] + difference.to(base[name].dtype)
