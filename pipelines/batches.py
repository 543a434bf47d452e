"""The rows of each training step, drawn from a run's training set by counter-based streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dreambooth.backbones import Backbone
from dreambooth.streams import integer, normal, shuffled
from pipelines import training_set
from pipelines.run import Run


class Batches:
    """The training rows of a step, drawn by streams keyed by (seed, subject, half, step, global sample index)."""

    def __init__(self, run: Run, backbone: Backbone, path: Path) -> None:
        """Open the training set; tensors are read as they are needed."""
        self._run, self._backbone = run, backbone
        self._file = safe_open(path, "pt")
        names = list(self._file.keys())
        self._text = {name.removeprefix("text."): self._whole(name) for name in names if name.startswith("text.")}
        self._ids = {name.removeprefix("ids."): self._whole(name) for name in names if name.startswith("ids.")}
        self._halves = [half for half in training_set.HALVES if f"{half}.mean" in names]
        self._rows = {
            half: {name.removeprefix(f"{half}."): self._file.get_slice(name) for name in names if name.startswith(half)}
            for half in self._halves
        }

    def _whole(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def rows(self, step: int, samples: range) -> dict[str, Any]:
        """CPU tensors for the global samples `samples` of a step: the instances first, then as many class-prior rows.

        Latents x and noise epsilon are (2m, C, h, w), times t (2m,), conditioning (2m, ...).
        """
        drawn = [self._row(half, step, sample) for half in self._halves for sample in samples]
        prompts = torch.tensor([self._halves.index(half) for half in self._halves for _ in samples])
        names = drawn[0]["sizes"].keys()
        sizes = {name: torch.stack([row["sizes"][name] for row in drawn]) for name in names}
        x = self._backbone.scale_latents(torch.stack([row["x"] for row in drawn]))
        if (low := self._run.training.low_resolution) is not None:
            noise = torch.stack([row["augmentation"] for row in drawn])
            sizes |= self._backbone.image_conditioning(x, noise, low)
        return {
            "x": x,
            "epsilon": torch.stack([row["epsilon"] for row in drawn]),
            "t": torch.tensor([row["t"] for row in drawn]),
            "conditioning": sizes | {name: value[prompts] for name, value in self._text.items()},
            "ids": {name: value[prompts] for name, value in self._ids.items()},
            "instances": len(samples),
        }

    def _row(self, half: str, step: int, sample: int) -> dict[str, Any]:
        run, columns = self._run, self._rows[half]
        low = run.training.low_resolution
        base = (run.seed, run.subject, half)
        count = columns["mean"].get_shape()[0]
        index = shuffled(step * run.training.batch + sample, count, *base, "order")
        mean, log_variance = columns["mean"][index], columns["log_variance"][index]
        latent_noise = normal(mean.shape, *base, "latent", step, sample)
        epsilon = normal(mean.shape, *base, "epsilon", step, sample)
        if run.training.offset_noise:
            epsilon += run.training.offset_noise * normal((len(mean), 1, 1), *base, "offset", step, sample)
        return {
            "x": mean + (0.5 * log_variance).exp() * latent_noise,
            "epsilon": epsilon,
            "augmentation": normal(mean.shape, *base, "augmentation", step, sample) if low else None,
            "t": integer(self._backbone.schedule.steps, *base, "t", step, sample),
            "sizes": {name: column[index] for name, column in columns.items() if name not in ("mean", "log_variance")},
        }
