"""The subject replica: one pipeline of a backbone, into which subjects' weights are copied in place.

Draws one request at a time: no batching, no loading beside sampling, and no pinned host memory yet.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dreambooth.backbones import Backbone
from dreambooth.sampling import DTYPES
from dreambooth.store import SubjectStore, Version

_LARGEST_SIDE = 2
"""Images may be this many times as wide or high as the backbone's own."""


class BadRequest(ValueError):
    """An order that the backbone cannot draw; the message tells the user why."""


@dataclass(frozen=True)
class Order:
    """What to draw: one image a seed. Together with the replica's precision and threads it determines every byte."""

    subject: str
    version: str
    prompt: str
    negative_prompt: str | None
    width: int
    height: int
    steps: int
    guidance: float
    seeds: tuple[int, ...]


class Skeleton:
    """A pipeline built once, that takes on one subject after another: modules stay, the values of tensors change."""

    def __init__(self, backbone: Backbone, dtype: torch.dtype, device: torch.device) -> None:
        """Build the pipeline with the backbone's own weights."""
        self.pipeline = backbone.pipeline(dtype, backbone.trained_parts()).to(device)
        networks = {name: part for name, part in self.pipeline.components.items() if isinstance(part, nn.Module)}
        self._live = {
            f"{component}.{name}": tensor
            for component, network in networks.items()
            for name, tensor in network.state_dict().items()
        }
        self._base: dict[str, Tensor] = {}  # the backbone's own values of every tensor that a subject has changed
        self._worn: str | None = None

    def wear(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Make the weights those of the subject version `name`: its tensors, and the backbone's for all others."""
        if name == self._worn:
            return
        assert tensors.keys() <= self._live.keys(), f"{name} holds tensors that its backbone lacks"
        assert all(tensors[key].shape == self._live[key].shape for key in tensors), f"{name} is of another shape"
        self._worn = None  # should a copy fail midway, the next subject is copied whatever it is
        for key in tensors.keys() - self._base.keys():
            self._base[key] = self._live[key].to("cpu", copy=True)
        for key, base in self._base.items():
            self._live[key].copy_(tensors.get(key, base))
        self._worn = name


class HostTier:
    """Subjects' tensors in host memory; beyond a budget of bytes the least recently used subjects are dropped."""

    def __init__(self, store: SubjectStore, dtype: torch.dtype, budget: int) -> None:
        """Start empty. The subject asked for last stays even when it alone exceeds `budget`."""
        self._store, self._dtype, self._budget = store, dtype, budget
        self._held: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def tensors(self, published: Version) -> Mapping[str, Tensor]:
        """What the version changed, by component and name; read from the store unless it is held."""
        name = f"{published.subject}@{published.id}"
        if name not in self._held:
            self._held[name] = self._read(published)
        self._held.move_to_end(name)
        while len(self._held) > 1 and self._bytes() > self._budget:
            self._held.popitem(last=False)
        return self._held[name]

    def _read(self, published: Version) -> dict[str, Tensor]:
        folder = self._store.local_version(published)
        return {
            # A copy, because what load_file gives may be a view of the mapped file, which is still on disk.
            f"{component}.{name}": tensor.to(self._dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
            for component in published.components
            for path in sorted((folder / component).glob("*.safetensors"))
            for name, tensor in load_file(path).items()
        }

    def _bytes(self) -> int:
        return sum(tensor.nbytes for tensors in self._held.values() for tensor in tensors.values())


class SubjectReplica:
    """Draws images of any subject of one backbone."""

    def __init__(
        self, store_uri: str, backbone: str, precision: str, device: str, threads: int, host_memory: int
    ) -> None:
        """Load the backbone with hash `backbone`; subjects wait until they are asked for."""
        torch.set_num_threads(threads)
        self._store = SubjectStore(store_uri)
        self._backbone = self._store.open_backbone(backbone)
        self._skeleton = Skeleton(self._backbone, DTYPES[precision], torch.device(device))
        self._host = HostTier(self._store, DTYPES[precision], host_memory)

    def draw(self, order: Order) -> list[bytes]:
        """The images as PNG files; raises BadRequest before any weights move."""
        check(order, self._backbone)
        published = self._store.version(order.subject, order.version)
        assert published is not None, f"{order.subject}@{order.version} is not in {self._store.root}"
        self._skeleton.wear(f"{order.subject}@{order.version}", self._host.tensors(published))
        return [self._draw(order, seed) for seed in order.seeds]

    def _draw(self, order: Order, seed: int) -> bytes:
        pipeline = self._skeleton.pipeline
        pixels = pipeline(
            prompt=order.prompt,
            negative_prompt=order.negative_prompt,
            width=order.width,
            height=order.height,
            num_inference_steps=order.steps,
            guidance_scale=order.guidance,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="np",
        ).images
        if not np.isfinite(pixels).all():
            raise ArithmeticError(f"{order.subject}@{order.version} gave pixels that are not finite")
        [image] = pipeline.numpy_to_pil(pixels)
        png = io.BytesIO()
        image.save(png, "PNG")
        return png.getvalue()


def check(order: Order, backbone: Backbone) -> None:
    """Raise BadRequest unless the backbone takes the order's size and the length of its prompts."""
    largest = _LARGEST_SIDE * backbone.default_resolution
    if max(order.width, order.height) > largest:
        raise BadRequest(f"size {order.width}x{order.height} is too large for this model: a side is at most {largest}")
    try:
        backbone.check_resolution(order.width)
        backbone.check_resolution(order.height)
        backbone.tokenize([order.prompt, order.negative_prompt or ""])
    except ValueError as error:
        raise BadRequest(str(error)) from error
