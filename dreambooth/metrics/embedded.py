"""The judges that ship with the package: small encoders trained on the embedded scenes, apart from the backbone.

They are no CLIP and no DINO: their scores carry their own names and compare with nothing but themselves.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, ResNetModel

WEIGHTS = Path(__file__).parents[1] / "embedded" / "weights" / "judges"
BATCH = 64


class _ImageTower:
    """A residual network and a projection, on pictures of one size."""

    def __init__(self, folder: Path, device: str | torch.device) -> None:
        if not folder.is_dir():
            raise ValueError(
                f"there are no judge weights at {folder}; build them with `python -m dreambooth.embedded.build`"
            )
        self.device = torch.device(device)
        self.tower = ResNetModel.from_pretrained(folder / "image", dtype=torch.float32).to(self.device).eval()
        head = load_file(folder / "image" / "head.safetensors")
        self.head = head["weight"].float().to(self.device)
        self.size = int(head["size"])

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures to pixels (N, 3, size, size) in [-1, 1]: the largest centred square, resized bicubically."""
        side = (self.size, self.size)
        squares = [ImageOps.fit(image.convert("RGB"), side, Image.Resampling.BICUBIC) for image in images]
        pixels = np.stack([np.asarray(square) for square in squares])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures to unit vectors (N, D)."""
        if not images:
            raise ValueError("there are no pictures to embed")
        parts = [self._embed(self.preprocess(images[i : i + BATCH])) for i in range(0, len(images), BATCH)]
        return torch.cat(parts)

    def _embed(self, pixels: Tensor) -> Tensor:
        pooled = self.tower(pixels.to(self.device)).pooler_output.flatten(1)
        return F.normalize(pooled @ self.head.T, dim=-1).cpu()


class EmbeddedClip(_ImageTower):
    """`embedded-clip`: pictures and captions in one space, trained as Radford et al. 2021 train CLIP."""

    name = "embedded-clip"

    def __init__(self, folder: Path = WEIGHTS / "embedded-clip", device: str | torch.device = "cpu") -> None:
        """Read the judge in `folder`, by default the one that ships."""
        super().__init__(folder, device)
        text = CLIPTextModelWithProjection.from_pretrained(folder / "text", dtype=torch.float32)
        self.text = text.to(self.device).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")

    @classmethod
    def ships(cls) -> bool:
        """Whether its weights lie beside the package."""
        return (WEIGHTS / cls.name).is_dir()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Captions to unit vectors (N, D)."""
        if not texts:
            raise ValueError("there are no texts to embed")
        tokens = self.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids
        return F.normalize(self.text(input_ids=tokens.to(self.device)).text_embeds, dim=-1).cpu()

    def choose(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[int]:
        """For each picture the number of the text that fits best: zero-shot classification."""
        return (self.embed_images(images) @ self.embed_texts(texts).T).argmax(1).tolist()


class EmbeddedDino(_ImageTower):
    """`embedded-dino`: two scenes of one individual are close, other individuals of its class are far."""

    name = "embedded-dino"

    def __init__(self, folder: Path = WEIGHTS / "embedded-dino", device: str | torch.device = "cpu") -> None:
        """Read the judge in `folder`, by default the one that ships."""
        super().__init__(folder, device)


JUDGES: dict[str, Callable[[], EmbeddedClip | EmbeddedDino]] = {
    EmbeddedClip.name: EmbeddedClip,
    EmbeddedDino.name: EmbeddedDino,
}


def save_image_tower(tower: ResNetModel, head: Tensor, size: int, folder: Path) -> None:
    """Write what `_ImageTower` reads; `head` is (D, width), `size` the side of the pictures."""
    tower.half().save_pretrained(folder / "image")
    save_file(
        {"weight": head.detach().half().contiguous(), "size": torch.tensor(size)}, folder / "image" / "head.safetensors"
    )
