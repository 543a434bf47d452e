"""The rows of each training step, drawn from a run's training set by counter-based streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dreambooth.backbones import Backbone, Conditioning, TokenIds
from dreambooth.common.streams import normal, shuffled, turn
from dreambooth.runs import RunSpec
from pipelines.training import training_set


@dataclass(frozen=True)
class Minibatch:
    """Rows of a pass, those of the photos or those of the class-prior images.

    Latents x and noise epsilon are (m, C, h, w), times t (m,), conditioning and token ids (m, ...).
    """

    x: Tensor
    epsilon: Tensor
    t: Tensor
    conditioning: Conditioning
    ids: TokenIds

    def to(self, device: torch.device) -> Minibatch:
        """The same rows on a device; from pinned memory without waiting for it."""
        return self._each(lambda value: value.to(device, non_blocking=True))

    def pinned(self) -> Minibatch:
        """The same rows in host memory from which a GPU reads by itself."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Minibatch:
        def changed(part: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: change(value) for name, value in part.items()}

        return Minibatch(
            change(self.x), change(self.epsilon), change(self.t), changed(self.conditioning), changed(self.ids)
        )


def joined(minibatches: Sequence[Minibatch]) -> Minibatch:
    """The rows of all minibatches, whose images must have one shape, as one."""

    def cat(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    return Minibatch(
        x=torch.cat([kind.x for kind in minibatches]),
        epsilon=torch.cat([kind.epsilon for kind in minibatches]),
        t=torch.cat([kind.t for kind in minibatches]),
        conditioning=cat([kind.conditioning for kind in minibatches]),
        ids=cat([kind.ids for kind in minibatches]),
    )


class Batches:
    """The training rows of a step, drawn by streams keyed by (seed, subject, kind, step, global sample index)."""

    def __init__(self, run: RunSpec, backbone: Backbone, path: Path) -> None:
        """Open the training set; tensors are read as they are needed."""
        self._run, self._backbone = run, backbone
        self._file = safe_open(path, "pt")
        names = list(self._file.keys())
        self._text = {name.removeprefix("text."): self._whole(name) for name in names if name.startswith("text.")}
        self._ids = {name.removeprefix("ids."): self._whole(name) for name in names if name.startswith("ids.")}
        self._buckets: dict[str, dict[str, dict[str, Any]]] = {}
        for name in sorted(names):
            kind, bucket, *column = name.split(".")
            if kind in training_set.KINDS:
                columns = self._buckets.setdefault(kind, {}).setdefault(bucket, {})
                columns[column[0]] = self._file.get_slice(name)

    def _whole(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def rows(self, step: int, samples: range) -> list[Minibatch]:
        """CPU tensors for the global samples `samples` of a step: of the photos, then as many of class-prior images."""
        return [self._minibatch(kind, step, samples) for kind in training_set.KINDS if kind in self._buckets]

    def _minibatch(self, kind: str, step: int, samples: range) -> Minibatch:
        buckets = self._buckets[kind]
        # One bucket for all samples of the step; which photo and view comes next is counted within it.
        photos = [columns["mean"].get_shape()[0] for columns in buckets.values()]
        chosen, visit = turn(step, photos, self._run.seed, self._run.subject, kind, "frame")
        bucket = list(buckets)[chosen]
        first = visit * self._run.training.batch
        drawn = [self._row(kind, bucket, first + sample, step, sample) for sample in samples]
        prompts = torch.stack([row["sizes"].pop("prompt") for row in drawn])
        sizes = {name: torch.stack([row["sizes"][name] for row in drawn]) for name in drawn[0]["sizes"]}
        x = self._backbone.latents.scale(torch.stack([row["x"] for row in drawn]))
        if (low := self._run.training.low_resolution) is not None:
            noise = torch.stack([row["augmentation"] for row in drawn])
            sizes |= self._backbone.image_conditioning(x, noise, low)
        return Minibatch(
            x,
            epsilon=torch.stack([row["epsilon"] for row in drawn]),
            t=torch.tensor([row["t"] for row in drawn]),
            conditioning=sizes | {name: value[prompts] for name, value in self._text.items()},
            ids={name: value[prompts] for name, value in self._ids.items()},
        )

    def _row(self, kind: str, bucket: str, position: int, step: int, sample: int) -> dict[str, Any]:
        run, columns = self._run, self._buckets[kind][bucket]
        low = run.training.low_resolution
        base = (run.seed, run.subject, kind)
        images, views = columns["mean"].get_shape()[:2]
        image = shuffled(position, images, *base, "order")
        view = shuffled(position // images, views, *base, "view", bucket, image)
        row = {name: column[image, view] for name, column in columns.items()}
        mean, log_variance = row.pop("mean"), row.pop("log_variance")
        latent_noise = normal(mean.shape, *base, "latent", step, sample)
        epsilon = normal(mean.shape, *base, "epsilon", step, sample)
        if run.training.offset_noise:
            epsilon += run.training.offset_noise * normal((len(mean), 1, 1), *base, "offset", step, sample)
        return {
            "x": mean + (0.5 * log_variance).exp() * latent_noise,
            "epsilon": epsilon,
            "augmentation": normal(mean.shape, *base, "augmentation", step, sample) if low else None,
            "t": self._backbone.objective.draw_t(*base, "t", step, sample),
            "sizes": row,
        }
