"""Class-prior images with Ray Data: any number of sets in one Dataset, each shard made once and written atomically."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import torch
from ray.data import ActorPoolStrategy

from dreambooth.prior_set import PriorSet
from dreambooth.sampling import load_pipeline, sample, to_pixels
from dreambooth.storage import Location
from dreambooth.store import SubjectStore
from pipelines.console import Display
from pipelines.plan import Lane


def generate_priors(store: SubjectStore, wanted: Sequence[tuple[PriorSet, int]], lane: Lane, display: Display) -> None:
    """Bring every set up to its count of images; shards that are in the store are not made again.

    One sampler actor a worker's resources, as many as `lane` has workers. When several subjects want one set, the
    largest count is made.
    """
    largest: dict[str, tuple[PriorSet, int]] = {}
    for prior, count in wanted:
        if prior.key not in largest or largest[prior.key][1] < count:
            largest[prior.key] = (prior, count)
    rows, present, total = [], 0, 0
    for prior, count in largest.values():
        there = prior.present(store.root)
        shards = prior.shards(count)
        total += len(shards) * prior.sampler.batch
        present += len(there & set(shards)) * prior.sampler.batch
        rows += [{"set": json.dumps(prior.as_dict()), "shard": shard} for shard in shards if shard not in there]
    with display.stage("class priors", total, "images", done=present) as stage:
        if not rows:
            return
        done = (
            ray.data.from_items(rows, override_num_blocks=len(rows))
            .map(
                ClassPriorSampler,
                fn_constructor_args=(store.root.uri,),
                compute=ActorPoolStrategy(size=min(lane.workers, len(rows))),
                num_cpus=lane.cpus_per_worker,
                num_gpus=lane.gpus_per_worker or None,
            )
            .map(write_shard, fn_args=(store.root.uri,), num_cpus=0.1)
        )
        for row in done.iter_rows():
            stage.advance(int(row["images"]), note=row["prompt"])


class ClassPriorSampler:
    """A Ray Data actor that draws shards; it keeps the pipeline of the set that it drew last."""

    def __init__(self, store_uri: str) -> None:
        """Load nothing until the first row says what is needed."""
        self._store = SubjectStore(store_uri)
        self._loaded: tuple[str, Any] | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Draw the shard of `row`; adds uint8 images (B, H, W, 3) and float32 latents (B, C, h, w)."""
        prior = PriorSet.from_dict(json.loads(row["set"]))
        backbone = self._store.open_backbone(prior.backbone)
        if self._loaded is None or self._loaded[0] != repr((prior.backbone, prior.sampler)):
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            self._loaded = (repr((prior.backbone, prior.sampler)), load_pipeline(backbone, prior.sampler, device))
        pipeline = self._loaded[1]
        seeds = prior.seeds(int(row["shard"]))
        images = sample(pipeline, [prior.prompt] * len(seeds), seeds, prior.sampler)
        pixels = to_pixels(images).to(pipeline.device)
        mean, log_variance = backbone.encode_images(pipeline.vae, pixels)
        return {
            "set": row["set"],
            "shard": row["shard"],
            "images": np.stack([np.asarray(image) for image in images]),
            "mean": mean.cpu().numpy(),
            "log_variance": log_variance.cpu().numpy(),
        }


def write_shard(row: dict[str, Any], store_uri: str) -> dict[str, Any]:
    """Encode a shard's images as PNG and write it to the store."""
    prior = PriorSet.from_dict(json.loads(row["set"]))
    prior.write_shard(Location(store_uri), int(row["shard"]), row["images"], row["mean"], row["log_variance"])
    return {"prompt": prior.prompt, "images": len(row["images"])}
