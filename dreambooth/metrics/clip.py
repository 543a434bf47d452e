"""CLIP as transformers ships it: pictures and texts in one space.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor

from dreambooth.metrics.crop import paper_crop

CLIP = "openai/clip-vit-base-patch32"
"""The model of the paper's scores."""
_BATCH = 64


class ClipJudge:
    """A `CLIPModel` with its processor, by hub id or by the folder that `save_pretrained` wrote.

    Pictures are cut as its processor does it, or with `paper` as the paper's scores want it.
    """

    def __init__(self, source: str | Path, device: str | torch.device = "cpu", paper: bool = False) -> None:
        """Load the model; raises ValueError when there is none, or its weights are not safetensors."""
        self.name = str(source)
        self._paper = paper
        self.device = torch.device(device)
        try:
            self._processor = CLIPProcessor.from_pretrained(source)
            self._model = CLIPModel.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
        except (OSError, ValueError) as error:  # missing, gated, unreachable, pickled: each is told in the first line
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"judge {self.name!r} cannot be loaded: {reason}") from error
        self._model.to(self.device).eval()

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures to the model's input: float32 (N, 3, H, W)."""
        if self._paper:
            side = self._model.config.vision_config.image_size
            cut = [paper_crop(image, side) for image in images]
            return self._processor(images=cut, do_resize=False, do_center_crop=False, return_tensors="pt").pixel_values
        return self._processor(images=[image.convert("RGB") for image in images], return_tensors="pt").pixel_values

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures to unit vectors, float32 (N, D), on the CPU."""
        parts = [
            self._model.get_image_features(self.preprocess(images[start : start + _BATCH]).to(self.device))
            for start in range(0, len(images), _BATCH)
        ]
        return F.normalize(torch.cat([part.pooler_output for part in parts]), dim=-1).cpu()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to unit vectors, float32 (N, D), on the CPU; what is longer than the model takes is cut."""
        tokens = self._processor(text=list(texts), padding=True, truncation=True, return_tensors="pt").to(self.device)
        return F.normalize(self._model.get_text_features(**tokens).pooler_output, dim=-1).cpu()
