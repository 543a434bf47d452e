"""Contrastive training of image and text towers on captioned pictures (Radford et al. 2021, "CLIP").

Used twice, apart: for the backbone's two text encoders, and for the judge `embedded-clip`.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, ResNetConfig, ResNetModel

from dreambooth.embedded.build.pool import Pool
from dreambooth.embedded.build.training import Clock, Recipe, autocast, batches, on_device, to_pixels, train

MAX_LOGIT_SCALE = 4.6
GROUP = 16


def new_image_tower(widths: tuple[int, ...]) -> ResNetModel:
    """A small residual network on pixels in [-1, 1]; its pooled output has `widths[-1]` numbers."""
    return ResNetModel(
        ResNetConfig(embedding_size=widths[0], hidden_sizes=list(widths), depths=[2] * len(widths), layer_type="basic")
    )


def new_text_config(tokenizer: CLIPTokenizer, width: int, layers: int, projection: int) -> CLIPTextConfig:
    """A text tower's shape for a tokenizer."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=projection,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 32),
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class Contrast(nn.Module):
    """One image tower against some text towers: symmetric cross-entropy of matching pictures with captions."""

    def __init__(self, image: ResNetModel, texts: list[CLIPTextModelWithProjection]) -> None:
        """Towers with fresh projections of the pictures, one a text tower."""
        super().__init__()
        self.image = image
        self.texts = nn.ModuleList(texts)
        width = image.config.hidden_sizes[-1]
        self.heads = nn.ModuleList([nn.Linear(width, text.config.projection_dim, bias=False) for text in texts])
        self.scale = nn.Parameter(torch.tensor(2.3))

    def towers(self) -> list[CLIPTextModelWithProjection]:
        """The text towers."""
        return list(self.texts)

    def embed_images(self, pixels: Tensor) -> list[Tensor]:
        """One unit vector for each text tower, from pixels (N, 3, H, W) in [-1, 1]."""
        pooled = self.image(pixels).pooler_output.flatten(1)
        return [F.normalize(head(pooled).float(), dim=-1) for head in self.heads]

    def embed_texts(self, tokens: Tensor) -> list[Tensor]:
        """One unit vector from each text tower, from token ids (N, length)."""
        return [F.normalize(text(input_ids=tokens).text_embeds.float(), dim=-1) for text in self.texts]

    def forward(self, pixels: Tensor, tokens: Tensor, same: Tensor) -> Tensor:
        """The loss; `same` (N, N) marks pairs of equal captions, which share the target."""
        targets = same / same.sum(1, keepdim=True)
        scale = self.scale.clamp(max=MAX_LOGIT_SCALE).exp()
        losses = []
        for image, text in zip(self.embed_images(pixels), self.embed_texts(tokens), strict=True):
            logits = scale * image @ text.T
            losses.append(F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets))
        return torch.stack(losses).mean() / 2


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids (N, length), padded to the tokenizer's full length as SDXL does."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def train_contrast(
    contrast: Contrast, pool: Pool, tokenizer: CLIPTokenizer, recipe: Recipe, folder: Path, clock: Clock, seed: int
) -> None:
    """Train all towers together on the pool; `folder` holds the checkpoint."""
    device = clock.device
    contrast.to(device)
    tokens = tokenize(tokenizer, pool.captions)
    _, caption_numbers = torch.unique(tokens, dim=0, return_inverse=True)
    # Nothing lies to the right of the longest caption but padding, which a causal tower never looks back to.
    length = int((tokens == tokenizer.eos_token_id).int().argmax(1).max()) + 1
    tokens, caption_numbers = tokens[:, :length].to(device), caption_numbers.to(device)
    images = on_device(pool.images, device)
    alike = rows_alike_but_for_the_noun(pool)

    def loss_of(step: int) -> Tensor:
        rows = on_device(hard_batch(alike, recipe.batch, seed, step), device)
        numbers = caption_numbers[rows]
        pixels = augment(to_pixels(images[rows]), step)
        with autocast(device):
            return contrast(pixels, tokens[rows], (numbers[:, None] == numbers).float())

    train(contrast, loss_of, recipe, folder, clock)


def rows_alike_but_for_the_noun(pool: Pool) -> list[np.ndarray]:
    """For each row of the pool, the rows whose captions say the same of another noun, or of its own."""
    groups: dict[str, list[int]] = {}
    keys = [
        caption.replace(noun, "_", 1).replace("an _", "a _")
        for caption, noun in zip(pool.captions, pool.nouns, strict=True)
    ]
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    arrays = {key: np.array(rows) for key, rows in groups.items()}
    return [arrays[key] for key in keys]


def hard_batch(alike: list[np.ndarray], batch: int, seed: int, step: int) -> np.ndarray:
    """The rows of a step: half of them next in order, half in groups of up to `GROUP` that differ by the noun alone.

    Places and colours tell most captions of an ordinary batch apart, so that nouns would hardly be learned.
    """
    rows = batches(len(alike), batch // 2, seed, step).tolist()
    rng = np.random.default_rng([seed, step])
    while len(rows) < batch:
        own = alike[int(rng.integers(len(alike)))]
        rows += rng.choice(own, min(GROUP, len(own), batch - len(rows)), replace=False).tolist()
    return np.array(rows)


def augment(pixels: Tensor, step: int) -> Tensor:
    """Mirror, turn, scale and shift each picture a little, and blur some, so that towers also read soft samples."""
    generator = torch.Generator(pixels.device).manual_seed(step)
    draws = torch.rand(6, len(pixels), generator=generator, device=pixels.device) * 2 - 1
    angle, scale, mirror = 0.15 * draws[0], 1 + 0.12 * draws[1], torch.where(draws[2] < 0, -1.0, 1.0)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    moves = torch.stack([mirror * cos, -sin, 0.12 * draws[3], mirror * sin, cos, 0.12 * draws[4]], dim=1)
    grid = F.affine_grid(moves.view(-1, 2, 3), list(pixels.shape), align_corners=False)
    out = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)
    blurred = F.avg_pool2d(F.pad(out, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return torch.where((draws[5] < -0.4)[:, None, None, None], blurred, out)
