"""What the ingress asks of a replica, and what it gets back."""

from __future__ import annotations

from dataclasses import dataclass

from dreambooth.backbones import Backbone

_LARGEST_SIDE = 2
"""Images may be this many times as wide or high as the backbone's own."""


class BadRequest(ValueError):
    """An order that the backbone cannot draw; the message tells the user why."""


@dataclass(frozen=True)
class GenerationRequest:
    """What to draw: one image a seed. With the replica's precision, threads and batches it determines every byte."""

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
    """Unfinished images to show of each image."""

    @property
    def model(self) -> str:
        """The name of the weights: `subject@version`."""
        return f"{self.subject}@{self.version}"


@dataclass(frozen=True)
class DrawnImage:
    """An image of an order as a PNG file, or a preview of it."""

    number: int
    """Which of the order's seeds it was drawn from."""
    png: bytes
    preview: int | None
    """Which preview it is; None for the finished image."""
    batch: int
    """How many images were drawn together."""


def check(order: GenerationRequest, backbone: Backbone) -> None:
    """Raise BadRequest unless the backbone takes the order's size and the length of its prompts."""
    largest = _LARGEST_SIDE * backbone.default_resolution
    if max(order.width, order.height) > largest:
        raise BadRequest(f"size {order.width}x{order.height} is too large for this model: a side is at most {largest}")
    try:
        backbone.latents.check_side(order.width)
        backbone.latents.check_side(order.height)
        backbone.text.tokenize([order.prompt, order.negative_prompt or ""])
    except ValueError as error:
        raise BadRequest(str(error)) from error
