"""Backbones: text-to-image models by hub id or path, one file a family behind one protocol."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path

from dreambooth.backbones.base import Backbone, LowResolution
from dreambooth.backbones.deepfloyd_if import DeepFloydIF, DeepFloydIFSuperResolution
from dreambooth.backbones.presets import EMBEDDED, Preset
from dreambooth.backbones.sdxl import SDXL
from dreambooth.backbones.stable_diffusion import StableDiffusion
from dreambooth.backbones.text import Conditioning, TokenIds
from dreambooth.backbones.upscaler import Upscaler

FAMILIES: tuple[type[Backbone], ...] = (StableDiffusion, SDXL, DeepFloydIF, DeepFloydIFSuperResolution)
"""Those that can be trained. A new one is a file of its own and a name here."""

PRESETS: dict[str, Preset] = {"embedded": EMBEDDED, **{family.family: family.family_preset for family in FAMILIES}}
"""The starting points of the embedded backbone and of each family, by name."""

_ALL: tuple[type[Backbone], ...] = (*FAMILIES, Upscaler)

__all__ = [
    "FAMILIES",
    "PRESETS",
    "SDXL",
    "Backbone",
    "Conditioning",
    "DeepFloydIF",
    "DeepFloydIFSuperResolution",
    "LowResolution",
    "StableDiffusion",
    "TokenIds",
    "Upscaler",
    "open_backbone",
]


def open_backbone(source: str | Path) -> Backbone:
    """Open a backbone by name: `embedded`, a folder written by diffusers' `save_pretrained`, or a hub id.

    Only configurations are read; weights wait until they are asked for. Raises ValueError when it is missing, of a
    family that is not supported, or holds pickled weights only.
    """
    folder = _folder(str(source))
    try:
        index = json.loads((folder / "model_index.json").read_text())
        pipeline = index["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"backbone {str(source)!r} has no readable model_index.json in {folder}: {error}") from error
    for family in _ALL:
        if pipeline in family.pipeline_classes:
            return family(folder, index, str(source))
    known = sorted(name for family in FAMILIES for name in family.pipeline_classes)
    nearest = difflib.get_close_matches(str(pipeline), known, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"backbone {str(source)!r} is a {pipeline!r}, a family that is not supported: nearest is {nearest!r}, "
        f"supported are {', '.join(known)}"
    )


def _folder(source: str) -> Path:
    if source == "embedded":
        from dreambooth.embedded import backbone_path

        return backbone_path()
    path = Path(source).expanduser()
    if path.is_dir():
        return path.absolute()
    if path.exists():
        raise ValueError(
            f"backbone {source!r} is a file: give the folder that diffusers' save_pretrained writes (single-file "
            "checkpoints convert with StableDiffusionXLPipeline.from_single_file(...).save_pretrained(FOLDER))"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith("."):
        raise ValueError(f"backbone {source!r} is missing: no such folder, and it is not a hub id like 'org/name'")
    return _download(source)


def _download(hub_id: str) -> Path:
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(hub_id, use_safetensors=True))
    except Exception as error:  # the hub client raises a dozen kinds: each is "cannot have this backbone" to the user
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"backbone {hub_id!r} is missing: there is no such folder, and the hub gave: {first_line} "
            "(for gated weights run `hf auth login`; behind a proxy set HTTPS_PROXY; offline, give a folder)"
        ) from error
