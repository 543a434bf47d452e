"""Encoding with Ray Data: latents and text of the instance and class-prior images, made once and kept."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from dreambooth.backbones import Backbone
from dreambooth.runs import PlannedSubject, Resources, RunSpec
from dreambooth.sampling.prior_set import latent
from dreambooth.sampling.sampler import to_pixels
from dreambooth.store import SubjectStore
from dreambooth.subjects.crops import Size, View, views
from dreambooth.subjects.photos import Subject
from pipelines.runtime.actor_pools import map_on_actors
from pipelines.runtime.console import Display
from pipelines.training.training_set import location_of


def encode_training_sets(
    store: SubjectStore, planned: Sequence[PlannedSubject], resources: Resources, display: Display
) -> None:
    """Make the training sets that are not in the store yet, one row of a Dataset a subject."""
    missing = [one for one in planned if not location_of(store, one.run).exists()]
    with display.progress("encode", len(planned), "subjects", done=len(planned) - len(missing)) as line:
        if not missing:
            return
        rows = [{"planned": pickle.dumps(one)} for one in missing]
        size = min(resources.workers, len(missing))
        for row in map_on_actors("encode", rows, TrainingSetEncoder, (store.root.uri,), resources, size):
            line.advance(note=row["subject"])


class TrainingSetEncoder:
    """A Ray Data actor that encodes subjects; it loads the encoders of a backbone once."""

    def __init__(self, store_uri: str) -> None:
        """Load nothing until the first row says what is needed."""
        self._store = SubjectStore(store_uri)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._networks: dict[str, Any] = {}
        self._backbone: Backbone | None = None
        self._hash = ""  # that of a backbone itself is known when all its weights are read

    def _network(self, name: str) -> Any:
        assert self._backbone is not None
        if name not in self._networks:
            self._networks[name] = self._backbone.load(name).to(self._device)
        return self._networks[name]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Encode the subject of `row` and write its training set."""
        planned: PlannedSubject = pickle.loads(row["planned"])
        run = planned.run
        if self._hash != run.backbone:
            self._backbone, self._networks = self._store.open_backbone(run.backbone), {}
            self._hash = run.backbone
        if self._device.type == "cpu":
            torch.set_num_threads(run.lane.cpus_per_worker)
        tensors = self._text(run) | self._instances(planned.subject, run) | self._priors(run)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "training_set.safetensors"
            save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, path)
            location_of(self._store, run).upload_file(path)
        return {"subject": run.subject}

    @torch.no_grad()
    def _text(self, run: RunSpec) -> dict[str, torch.Tensor]:
        assert self._backbone is not None
        ids = self._backbone.text.tokenize(_distinct_prompts(run))
        trained = run.training.trains_text(self._backbone)
        tensors = {f"ids.{name}": value for name, value in ids.items()} if trained else {}
        if trained and run.training.prior_kind != "teacher":
            return tensors
        encoders = {name: self._network(name) for name in self._backbone.text_encoders}
        text = self._backbone.text.encode(encoders, {name: value.to(self._device) for name, value in ids.items()})
        return tensors | {f"text.{name}": value for name, value in text.items()}

    def _instances(self, subject: Subject, run: RunSpec) -> dict[str, torch.Tensor]:
        training, prompts = run.training, _distinct_prompts(run)
        photos: dict[Size, list[dict[str, torch.Tensor]]] = {}
        for number, (image, prompt) in enumerate(zip(subject.images, run.prompts, strict=True)):
            original, pixels = (image.height, image.width), image.pixels()
            bucket = training.bucket_of(original)
            key = (run.seed, run.subject, "view", number)
            shown = views(
                original, bucket, *key, count=training.views, flip=training.flip, random_crop=training.random_crop
            )
            rows = [self._encode(pixels, view) | {"prompt": torch.tensor(prompts.index(prompt))} for view in shown]
            photos.setdefault(bucket, []).append(_stacked(rows))
        return {
            f"{_columns('instance', bucket)}.{name}": value
            for bucket, rows in photos.items()
            for name, value in _stacked(rows).items()
        }

    def _encode(self, photo: Image.Image, view: View) -> dict[str, torch.Tensor]:
        """The latent of a view of a photo, and what the denoiser is told of its size."""
        assert self._backbone is not None
        encoders = {name: self._network(name) for name in self._backbone.image_encoders}
        mean, log_variance = self._backbone.latents.encode(encoders, to_pixels([view.show(photo)]).to(self._device))
        sizes = self._backbone.size_conditioning(view.original, view.corner, view.bucket)
        return {"mean": mean[0].cpu(), "log_variance": log_variance[0].cpu(), **sizes}

    def _priors(self, run: RunSpec) -> dict[str, torch.Tensor]:
        assert self._backbone is not None
        if run.prior is None:
            return {}
        columns = ["latent_shape", "latent_mean", "latent_log_variance"]
        rows = list(run.prior.rows(self._store.root, run.training.prior_images, columns))
        tensors = {
            name: torch.from_numpy(np.stack([latent(row, f"latent_{name}") for row in rows]))
            for name in ("mean", "log_variance")
        }
        size = (run.training.resolution, run.training.resolution)
        same = self._backbone.size_conditioning(size, (0, 0), size)
        same["prompt"] = torch.tensor(_distinct_prompts(run).index(run.class_prompt))
        tensors |= {name: value.expand(len(rows), *value.shape) for name, value in same.items()}
        return {f"{_columns('prior', size)}.{name}": value.unsqueeze(1) for name, value in tensors.items()}


def _distinct_prompts(run: RunSpec) -> list[str]:
    """The rows of `text` and `ids`."""
    return list(dict.fromkeys([*run.prompts, run.class_prompt]))


def _columns(kind: str, bucket: Size) -> str:
    return f"{kind}.{bucket[0]}x{bucket[1]}"


def _stacked(rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
