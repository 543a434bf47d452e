"""The files of a model: a folder in the layout of diffusers' `save_pretrained`, its hash, and what is loaded of it."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import ConfigMixin
from torch import nn

from dreambooth.common.location import digest

_LIBRARIES = ("diffusers", "transformers")


class ModelFolder:
    """A model on disk. Nothing is loaded until asked for.

    `source` is what the user named (hub id or path); `folder` holds the files.
    """

    denoiser: ClassVar[str] = "unet"
    """Component name of the network that predicts; in it alone a half-precision variant is looked for."""

    def __init__(self, folder: Path, index: Mapping[str, Any], source: str) -> None:
        """Keep the folder and its parsed `model_index.json`."""
        self.folder = folder
        self.index = index
        self.source = source

    def _check_weights(self, component: str) -> None:
        files = [path.name for path in (self.folder / component).glob("*")]
        if any(name.endswith(".safetensors") for name in files):
            return
        pickled = sorted(name for name in files if name.endswith((".bin", ".pt", ".ckpt", ".pth")))
        if pickled:
            raise ValueError(
                f"backbone {self.source!r} holds {component} only as a pickle ({pickled[0]}), which can run code "
                "when it is read: convert it with diffusers' save_pretrained(..., safe_serialization=True), or use a "
                "revision with safetensors"
            )
        raise ValueError(f"backbone {self.source!r} is incomplete: no {component}/*.safetensors in {self.folder}")

    @cached_property
    def files(self) -> dict[str, int]:
        """The files that make up the backbone, as {relative path: size in bytes}."""
        folders = [name for name, entry in self.index.items() if isinstance(entry, list) and name != "safety_checker"]
        paths = [self.folder / "model_index.json"]
        for name in folders:
            found = [path for path in (self.folder / name).rglob("*") if path.suffix in {".json", ".txt", ".model"}]
            weights = list((self.folder / name).rglob("*.safetensors"))
            whole = [path for path in weights if ".fp16." not in path.name]
            paths += found + (whole or weights)
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in sorted(paths)}

    @cached_property
    def variant(self) -> str | None:
        """`fp16` when that is the only form in which the denoiser's weights are there."""
        names = [path for path in self.files if path.startswith(f"{self.denoiser}/") and path.endswith(".safetensors")]
        return "fp16" if all(".fp16." in name for name in names) else None

    @cached_property
    def hash(self) -> str:
        """The hex digest of all its files: two folders with the same weights and configuration share it."""
        hashes = {}
        for name in self.files:
            with (self.folder / name).open("rb") as stream:
                hashes[name] = hashlib.file_digest(stream, "sha256").hexdigest()
        return digest(hashes)

    def _class(self, component: str) -> Any:
        library, name = self.index[component]
        if library not in _LIBRARIES:
            raise ValueError(f"backbone {self.source!r}: {component} comes from {library!r}, not one of {_LIBRARIES}")
        return getattr(importlib.import_module(library), name)

    def load(self, component: str, dtype: torch.dtype = torch.float32, trained: Path | None = None) -> nn.Module:
        """One network of the backbone, or of its kind in the folder `trained`, on the CPU in evaluation mode."""
        folder, variant = (self.folder, self.variant) if trained is None else (trained, None)
        network = self._class(component).from_pretrained(
            folder, subfolder=component, dtype=dtype, variant=variant, use_safetensors=True
        )
        return network.eval()

    def empty(self, component: str) -> nn.Module:
        """One network with its shapes but no storage (torch's meta device), from its configuration alone."""
        kind = self._class(component)
        with torch.device("meta"):
            if issubclass(kind, ConfigMixin):
                return kind.from_config(kind.load_config(self.folder, subfolder=component)).eval()
            return kind(kind.config_class.from_pretrained(self.folder, subfolder=component)).eval()

    def load_tokenizer(self, component: str) -> Any:
        """A tokenizer."""
        return self._class(component).from_pretrained(self.folder, subfolder=component)

    def config(self, component: str) -> dict[str, Any]:
        """A network's configuration, as its file states it."""
        return dict(self._class(component).load_config(self.folder, subfolder=component))

    def scheduler_config(self, component: str = "scheduler") -> dict[str, Any]:
        """A scheduler's configuration; ValueError when there is none."""
        try:
            return dict(DDPMScheduler.load_config(self.folder, subfolder=component))
        except OSError as error:
            raise ValueError(f"backbone {self.source!r} is incomplete: no {component} in {self.folder}") from error
