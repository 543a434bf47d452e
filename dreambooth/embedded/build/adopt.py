"""Take shipped weights into a work folder, so that a build trains their U-Net further instead of starting from nothing.

The other parts are taken as finished: the U-Net is bound to their latents and text states.
"""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, ResNetModel

from dreambooth.embedded.build.config import BuildConfig
from dreambooth.embedded.build.contrastive import Contrast
from dreambooth.embedded.build.judges import Individuals, new_clip
from dreambooth.embedded.build.text import new_contrast
from dreambooth.embedded.build.training import save_checkpoint

ADOPTED = "adopted.json"


def adopt(weights: Path, config: BuildConfig, out: Path) -> None:
    """Write the work folder that the shipped `weights` could have come from; `adopted.json` says how they were trained.

    Raises ValueError where their shapes are not those of `config`.
    """
    if (out / ADOPTED).exists():
        return
    if not (weights / "training.json").is_file():
        raise ValueError(f"--continue-from {weights} holds no embedded backbone: it lacks training.json")
    backbone, judges = weights / "backbone", weights / "judges"
    out.mkdir(parents=True, exist_ok=True)
    shutil.copytree(backbone / "tokenizer", out / "tokenizer", dirs_exist_ok=True)
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    parts = {
        "vae": (AutoencoderKL.from_pretrained(backbone / "vae"), config.vae.recipe.steps),
        "text": (_text(new_contrast(tokenizer, config.text), backbone), config.text.recipe.steps),
        "judge-clip": (_clip(new_clip(tokenizer, config.judges), judges / "embedded-clip"), config.judges.clip.steps),
        "judge-dino": (_dino(Individuals(config.judges), judges / "embedded-dino"), config.judges.dino.steps),
        "unet": (UNet2DConditionModel.from_pretrained(backbone / "unet"), 0),
    }
    for name, (module, step) in parts.items():
        module.float()
        save_checkpoint(out / name, module, None, module, step)
    shutil.copy(weights / "training.json", out / ADOPTED)


def steps_before(out: Path) -> int:
    """The optimizer steps behind an adopted U-Net, 0 where none was adopted."""
    return int(json.loads((out / ADOPTED).read_text())["unet"]) if (out / ADOPTED).exists() else 0


def _text(contrast: Contrast, backbone: Path) -> Contrast:
    """Both text towers; the pictures' side is not shipped and stays untrained."""
    first, second = contrast.towers()
    _fill(first.text_model, CLIPTextModel.from_pretrained(backbone / "text_encoder"))
    _fill(second, CLIPTextModelWithProjection.from_pretrained(backbone / "text_encoder_2"))
    return contrast


def _clip(contrast: Contrast, folder: Path) -> Contrast:
    _fill(contrast.image, ResNetModel.from_pretrained(folder / "image"))
    _fill(contrast.towers()[0], CLIPTextModelWithProjection.from_pretrained(folder / "text"))
    _fill(contrast.heads[0], load_file(folder / "image" / "head.safetensors"))
    return contrast


def _dino(individuals: Individuals, folder: Path) -> Individuals:
    _fill(individuals.image, ResNetModel.from_pretrained(folder / "image"))
    _fill(individuals.head, load_file(folder / "image" / "head.safetensors"))
    return individuals


def _fill(module: nn.Module, source: nn.Module | dict[str, torch.Tensor]) -> None:
    tensors = source.state_dict() if isinstance(source, nn.Module) else {"weight": source["weight"]}
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"the weights to go on from have other shapes than the preset: {error}") from error
