"""Judges: frozen encoders that score pictures. Every score names the judge that gave it."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from PIL import Image
from torch import Tensor


@runtime_checkable
class Judge(Protocol):
    """An encoder of pictures into unit vectors, whose dot products are the scores."""

    name: str

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures to the encoder's input, float (N, 3, H, W)."""
        ...

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures to unit vectors, float32 (N, D)."""
        ...


@runtime_checkable
class TextJudge(Judge, Protocol):
    """A judge that also reads text, into the same space."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to unit vectors, float32 (N, D)."""
        ...


def load_judge(name: str) -> Judge:
    """A judge by name: `embedded-clip` or `embedded-dino`."""
    from dreambooth.metrics.embedded import JUDGES

    if name not in JUDGES:
        raise ValueError(f"no judge is called {name!r}; there are {', '.join(sorted(JUDGES))}")
    return JUDGES[name]()
