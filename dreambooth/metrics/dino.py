"""DINO, which tells individuals of a class apart: the paper's judge of subject fidelity.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import ViTModel

from dreambooth.metrics.crop import paper_crop

DINO = "facebook/dino-vits16"
_BATCH = 64
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's pixels, on which DINO was trained."""


class DinoJudge:
    """A vision transformer's class token; by default the paper's ViT-S/16."""

    def __init__(self, source: str | Path = DINO, device: str | torch.device = "cpu") -> None:
        """Load it by hub id or folder; raises ValueError when there is none, or its weights are not safetensors."""
        self.name = str(source)
        self.device = torch.device(device)
        try:
            model = ViTModel.from_pretrained(source, dtype=torch.float32, use_safetensors=True, add_pooling_layer=False)
        except (OSError, ValueError) as error:  # missing, gated, unreachable, pickled: each is told in the first line
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"judge {self.name!r} cannot be loaded: {reason}") from error
        self._model = model.to(self.device).eval()

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures to the model's input: float32 (N, 3, side, side), normalized."""
        side = self._model.config.image_size
        pixels = np.stack([np.asarray(paper_crop(image, side)) for image in images])
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (_MEAN, _STD))
        return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures to unit vectors, float32 (N, D), on the CPU."""
        parts = [
            self._model(self.preprocess(images[start : start + _BATCH]).to(self.device)).last_hidden_state[:, 0]
            for start in range(0, len(images), _BATCH)
        ]
        return F.normalize(torch.cat(parts), dim=-1).cpu()
