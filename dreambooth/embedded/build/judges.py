"""Training of the embedded judges, on scenes, seeds and weights of their own."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, ResNetModel

from dreambooth.embedded.build.config import JudgeConfig
from dreambooth.embedded.build.contrastive import (
    Contrast,
    augment,
    new_image_tower,
    new_text_config,
    train_contrast,
)
from dreambooth.embedded.build.pool import Pool
from dreambooth.embedded.build.training import Clock, autocast, load_average, on_device, to_pixels, train
from dreambooth.metrics.embedded import save_image_tower

CLIP_SEED, DINO_SEED = 21, 22
SIBLINGS = 8
TEMPERATURE = 0.1


def new_clip(tokenizer: CLIPTokenizer, config: JudgeConfig) -> Contrast:
    """An untrained `embedded-clip`."""
    text = new_text_config(tokenizer, config.text_width, config.text_layers, config.projection)
    return Contrast(new_image_tower(config.tower), [CLIPTextModelWithProjection(text)])


def train_clip(tokenizer: CLIPTokenizer, pool: Pool, config: JudgeConfig, folder: Path, clock: Clock) -> None:
    """Train `embedded-clip` on scenes of all kinds."""
    train_contrast(new_clip(tokenizer, config), pool, tokenizer, config.clip, folder, clock, CLIP_SEED)


class Individuals(nn.Module):
    """An image tower and a projection, whose unit vectors tell individuals apart."""

    def __init__(self, config: JudgeConfig) -> None:
        """An untrained tower of the configured widths."""
        super().__init__()
        self.image: ResNetModel = new_image_tower(config.tower)
        self.head = nn.Linear(config.tower[-1], config.projection, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Unit vectors (N, D) of pixels (N, 3, H, W) in [-1, 1]."""
        return F.normalize(self.head(self.image(pixels).pooler_output.flatten(1)).float(), dim=-1)


def train_dino(pool: Pool, config: JudgeConfig, folder: Path, clock: Clock) -> None:
    """Train `embedded-dino` on pairs of scenes of one individual, without labels in the loss (Chen et al. 2020,
    "A Simple Framework for Contrastive Learning", NT-Xent): other individuals in the batch are the negatives.

    A batch holds `SIBLINGS` individuals of each of its nouns, so that the easy way out, naming the class, is closed.
    """
    model = Individuals(config).to(clock.device)
    images = on_device(pool.images, clock.device)
    by_noun = pairs_by_noun(pool)

    def loss_of(step: int) -> Tensor:
        rows = sibling_batch(by_noun, config.dino.batch, step)
        picked = on_device(np.concatenate([2 * rows, 2 * rows + 1]), clock.device)
        pixels = augment(to_pixels(images[picked]), step)
        with autocast(clock.device):
            vectors = model(pixels)
        logits = vectors @ vectors.T / TEMPERATURE
        logits.fill_diagonal_(-1e4)
        partner = torch.arange(len(logits), device=logits.device).roll(len(rows))
        return F.cross_entropy(logits, partner)

    train(model, loss_of, config.dino, folder, clock)


def pairs_by_noun(pool: Pool) -> list[np.ndarray]:
    """For each noun the numbers of its pairs, whose scenes are 2 k and 2 k + 1 in the pool."""
    nouns = np.array(pool.nouns[::2])
    return [np.flatnonzero(nouns == noun) for noun in sorted(set(pool.nouns))]


def sibling_batch(by_noun: list[np.ndarray], batch: int, step: int) -> np.ndarray:
    """Pair numbers of a step: some nouns, and some individuals of each."""
    rng = np.random.default_rng([DINO_SEED, step])
    rows: list[np.ndarray] = []
    while sum(map(len, rows)) < batch:
        own = by_noun[int(rng.integers(len(by_noun)))]
        rows.append(rng.choice(own, min(SIBLINGS, len(own)), replace=False))
    return np.unique(np.concatenate(rows)[:batch])


def save_judges(clip: Contrast, dino: Individuals, tokenizer: CLIPTokenizer, size: int, folder: Path) -> None:
    """Write both judges in the shape that `dreambooth.metrics.embedded` reads, weights in half precision."""
    save_image_tower(clip.image, clip.state_dict()["heads.0.weight"], size, folder / "embedded-clip")
    clip.towers()[0].half().save_pretrained(folder / "embedded-clip" / "text")
    tokenizer.save_pretrained(folder / "embedded-clip" / "tokenizer")
    save_image_tower(dino.image, dino.head.weight, size, folder / "embedded-dino")


def finished_judges(
    tokenizer: CLIPTokenizer, config: JudgeConfig, clip_folder: Path, dino_folder: Path
) -> tuple[Contrast, Individuals]:
    """The trained judges from their checkpoints."""
    clip, dino = new_clip(tokenizer, config), Individuals(config)
    load_average(clip_folder, clip)
    load_average(dino_folder, dino)
    return clip, dino
