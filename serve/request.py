"""What the ingress asks of a replica, and what it gets back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the commands read keys without loading torch
    from dreambooth.backbones import Backbone

_LARGEST_SIDE = 2
"""Largest side of an image, as a multiple of the resolution of the backbone."""


class BadRequest(ValueError):
    """A request that the backbone cannot draw; the message tells the user why."""


@dataclass(frozen=True)
class GenerationRequest:
    """A request for images, one for each seed.

    With the replica's precision, threads and batches it determines every byte of them.
    """

    subject: str
    version: str
    prompt: str
    negative_prompt: str | None
    width: int
    height: int
    steps: int
    guidance: float
    seeds: tuple[int, ...]
    previews: int = 0
    """Previews to send of each image while it is unfinished."""

    @property
    def model(self) -> str:
        """The name of the weights: `subject@version`."""
        return f"{self.subject}@{self.version}"


@dataclass(frozen=True)
class DrawnImage:
    """An image as a PNG file, or a preview of it."""

    number: int
    """Index of its seed in the request."""
    png: bytes
    preview: int | None
    """Index of the preview; None for the finished image."""
    batch: int
    """Size of the batch in which it was drawn."""


def check(request: GenerationRequest, backbone: Backbone) -> None:
    """Raise BadRequest unless the backbone can draw this size, from prompts of this length."""
    largest = _LARGEST_SIDE * backbone.default_resolution
    if max(request.width, request.height) > largest:
        raise BadRequest(
            f"size {request.width}x{request.height} is too large for this model: a side is at most {largest}"
        )
    try:
        backbone.latents.check_side(request.width)
        backbone.latents.check_side(request.height)
        backbone.text.tokenize([request.prompt, request.negative_prompt or ""])
    except ValueError as error:
        raise BadRequest(str(error)) from error
