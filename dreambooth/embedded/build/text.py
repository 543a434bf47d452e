"""The backbone's two text encoders, trained against one image tower, then frozen."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dreambooth.embedded.build.config import TextConfig
from dreambooth.embedded.build.contrastive import Contrast, new_image_tower, new_text_config, train_contrast
from dreambooth.embedded.build.pool import Pool
from dreambooth.embedded.build.training import Clock, load_average

SEED = 12


def new_contrast(tokenizer: CLIPTokenizer, config: TextConfig) -> Contrast:
    """Two text towers of SDXL's kinds (the first one's projection serves training alone) and an image tower."""
    towers = [
        CLIPTextModelWithProjection(new_text_config(tokenizer, width, layers, config.projection))
        for width, layers in zip(config.widths, config.layers, strict=True)
    ]
    return Contrast(new_image_tower(config.tower), towers)


def train_text(tokenizer: CLIPTokenizer, pool: Pool, config: TextConfig, folder: Path, clock: Clock) -> None:
    """Train both text encoders on the pool's captions and pictures."""
    train_contrast(new_contrast(tokenizer, config), pool, tokenizer, config.recipe, folder, clock, SEED)


def finished_encoders(
    tokenizer: CLIPTokenizer, config: TextConfig, folder: Path
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """The trained pair, as SDXL's pipeline takes them."""
    contrast = new_contrast(tokenizer, config)
    load_average(folder, contrast)
    first, second = contrast.towers()
    plain = CLIPTextModel(first.config)
    plain.load_state_dict(first.text_model.state_dict())
    return plain.eval().requires_grad_(False), second.eval().requires_grad_(False)


@torch.no_grad()
def encode_prompts(
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection], tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """SDXL's conditioning of token ids (N, length): the penultimate states of both encoders side by side, shape
    (N, length, w1 + w2), and the second one's pooled projection (N, projection)."""
    first = encoders[0](input_ids=tokens, output_hidden_states=True)
    second = encoders[1](input_ids=tokens, output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second.text_embeds
