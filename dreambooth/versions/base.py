"""Version forms: how what a subject changed against its backbone is kept, loaded, and swapped in while serving."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin
from torch import Tensor

from dreambooth.backbones import Backbone

TOKEN_EMBEDDINGS = "token_embeddings"
"""A server has each text encoder's table of token embeddings under `token_embeddings.TEXT_ENCODER` too."""

State = Mapping[str, Tensor]
"""Trained float32 parameters by their names in the method's module, as a final checkpoint holds them."""
Files = Mapping[str, Mapping[str, Any]]
"""A version's files as its manifest lists them: path to `size` and `sha256`."""


@dataclass(frozen=True)
class Content:
    """What a version holds, in memory."""

    parts: Mapping[str, Any]
    """What is saved, by component name; each has diffusers' and transformers' `save_pretrained`."""
    replacements: Mapping[str, Any]
    """What a pipeline of the backbone uses instead of its own, by component name."""


class VersionForm(ABC):
    """A form of versions. A manifest names it; see `form_of` for those that do not."""

    name: ClassVar[str]

    @abstractmethod
    def components(self, family: type[Backbone]) -> set[str]:
        """The components that a version of this form may hold of a backbone of the family."""

    @abstractmethod
    def build(
        self, backbone: Backbone, state: State, *, trained: Sequence[str], identifier: str, dtype: torch.dtype
    ) -> Content:
        """What training has given, on the CPU in `dtype`. `trained` names the networks that were trained whole."""

    def save(self, content: Content, folder: Path, backbone: str) -> None:
        """Write the parts, each to a folder of its name; `backbone` is the backbone's hash."""
        for name, part in content.parts.items():
            if isinstance(part, ConfigMixin):  # it would write down the folder of this machine that it was read from
                part.register_to_config(_name_or_path=backbone)
            part.save_pretrained(folder / name)

    @abstractmethod
    def load(
        self, folder: Path, backbone: Backbone, components: Sequence[str], dtype: torch.dtype
    ) -> Mapping[str, Any]:
        """What a pipeline of the backbone uses instead of its own, by component name, from a version's local folder."""

    @abstractmethod
    def most_bytes(self, components: Sequence[str], files: Files, base: Mapping[str, Tensor]) -> int:
        """The most bytes that `changes` can take in the types of `base`, before anything is read."""

    @abstractmethod
    def changes(
        self, folder: Path, components: Sequence[str], files: Files, base: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """The version's tensors, named as those of `base` (`COMPONENT.NAME`), or rows of them (`COMPONENT.NAME[ROW]`).

        `base` holds the backbone's tensors as a server has them. Raises ValueError when a file is missing.
        """
