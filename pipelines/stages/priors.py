"""Class-prior images with Ray Data: any number of sets in one Dataset, each shard made once and written atomically.

A row is a shard: one batch of one set, which is drawn, retried and written alone. What is missing is read from the
store, so a run that was killed continues with what no one has made yet.
"""

from __future__ import annotations

import random
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dreambooth.backbones import Backbone
from dreambooth.common.location import Location
from dreambooth.runs import Resources
from dreambooth.sampling.prior_set import PriorSet
from dreambooth.sampling.sampler import load_pipeline, sample, to_pixels
from dreambooth.store import SubjectStore
from pipelines.runtime.actor_pools import map_on_actors, pool_size
from pipelines.runtime.console import Display

Shard = tuple[str, int]
"""The key of a set and the number of a shard."""


def generate_priors(
    store: SubjectStore,
    wanted: Sequence[tuple[PriorSet, int]],
    resources: Resources,
    display: Display,
    samplers: int | None = None,
) -> dict[str, str]:
    """Bring every set up to its count of images; shards that are in the store are not made again.

    A shard that fails (pixels or latents that are not finite, a decode or a write that breaks) is named, and retried
    alone by a fresh sampler when all others are done.

    Args:
        store: where the sets are, and the backbones that they name.
        wanted: sets and how many images of each; of a set that is wanted several times, the largest count is made.
        resources: the resources of one sampler.
        display: where progress is shown.
        samplers: actors to ask for. By default as many as the cluster has room for, and no fewer than
            `resources.workers`.

    Returns:
        The sets that could not be finished: their keys, each with the reason. Empty when all is well.
    """
    sets = {prior.key: prior for prior, _ in wanted}
    progress = {
        key: _Progress(store, prior, max(n for one, n in wanted if one == prior)) for key, prior in sets.items()
    }
    missing = [(key, shard) for key, one in progress.items() for shard in one.missing]
    total = sum(one.total for one in progress.values())
    with display.progress("class priors", total, "images", done=sum(one.done for one in progress.values())) as line:

        def make(shards: Sequence[Shard]) -> dict[Shard, str]:
            failures: dict[Shard, str] = {}
            for key, shard, failure in _draw(store, sets, shards, resources, samplers):
                if failure:
                    failures[key, shard] = failure
                    continue
                progress[key].missing.remove(shard)
                line.advance(sets[key].sampler.batch, note=str(progress[key]))
                if not progress[key].missing:
                    display.say(f"class priors: {progress[key]}, preview in {progress[key].write_preview()}")
            return failures

        # Two jobs that want the same sets start in different places and pass over what the other has made.
        start = random.randrange(max(1, len(missing)))
        failures = make(missing[start:] + missing[:start])
        for (key, shard), reason in failures.items():
            display.say(f"class priors: {_name(sets[key], shard)} failed, and will be retried alone: {reason}")
        failures = make(list(failures))
        for one in progress.values():
            if not one.missing and not one.preview.exists():  # killed just before it was drawn
                one.write_preview()
    reasons: dict[str, str] = {}
    for (key, shard), reason in failures.items():
        display.say(f"class priors: {_name(sets[key], shard)} failed again: {reason}")
        reasons.setdefault(key, f"{_name(sets[key], shard)} cannot be made: {reason}")
    return reasons


class _Progress:
    """How far one set is."""

    def __init__(self, store: SubjectStore, prior: PriorSet, count: int) -> None:
        self._store, self._prior, self._count = store.root, prior, count
        shards = prior.shards(count)
        self.missing = set(shards) - prior.present(store.root)
        self.total = len(shards) * prior.sampler.batch
        self.preview = prior.location(store.root) / "preview.png"

    @property
    def done(self) -> int:
        """Images that are in the store."""
        return self.total - len(self.missing) * self._prior.sampler.batch

    def write_preview(self) -> Location:
        return self._prior.write_preview(self._store, self._count)

    def __str__(self) -> str:
        return f"{self._prior.prompt!r} {self.done}/{self.total}"


def _name(prior: PriorSet, shard: int) -> str:
    indices = prior.indices(shard)
    return f"{prior.prompt!r} images {indices[0]}-{indices[-1]} (shard {shard} of set {prior.key})"


def _draw(
    store: SubjectStore,
    sets: Mapping[str, PriorSet],
    shards: Sequence[Shard],
    resources: Resources,
    samplers: int | None,
) -> Iterator[tuple[str, int, str]]:
    """Make the shards on a pool of fresh actors; yields set, shard and failure ("" when it is made) as they come."""
    if not shards:
        return
    rows = [{"set": key, "shard": shard} for key, shard in shards]
    arguments = (store.root.uri, {key: sets[key] for key, _ in shards})
    size = pool_size(resources, len(shards), samplers)
    # One call draws while the other encodes and writes, or waits its turn: the device has no pause between shards, and
    # at the tail no sampler keeps more than one shard from those that are out of work.
    for row in map_on_actors("class_priors", rows, ClassPriorSampler, arguments, resources, size, calls=2):
        yield row["set"], int(row["shard"]), row["failure"]


class ClassPriorSampler:
    """A Ray Data actor that draws shards and writes them; it keeps the pipeline that it used last.

    Two calls may run at a time: one has the device, the other encodes its images and writes them.
    """

    def __init__(self, store_uri: str, sets: Mapping[str, PriorSet]) -> None:
        """Load nothing until the first row says what is needed."""
        self._store, self._sets = SubjectStore(store_uri), sets
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._drawing = threading.Lock()
        self._loaded: tuple[Any, Backbone, Any] | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Make the shard of `row` unless it is in the store; adds `failure`, why it could not be made, or ""."""
        prior, shard, failure = self._sets[row["set"]], int(row["shard"]), ""
        try:
            if not prior.has_shard(self._store.root, shard):
                with self._drawing:
                    drawn = self._draw(prior, shard)
                prior.write_shard(self._store.root, shard, *drawn)
        except (ArithmeticError, RuntimeError, OSError) as error:  # numbers, torch (out of memory too), the store
            traceback.print_exc()
            failure = f"{type(error).__name__}: {error}"
        return {**row, "failure": failure}

    def _draw(self, prior: PriorSet, shard: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The shard's images, uint8 (B, H, W, 3), and their latents' mean and log-variance, float32 (B, C, h, w)."""
        backbone, pipeline = self._pipeline(prior)
        torch.set_num_threads(prior.sampler.threads)  # it counts for the calling thread
        seeds = prior.seeds(shard)
        images = sample(pipeline, [prior.prompt] * len(seeds), seeds, prior.sampler)
        mean, log_variance = backbone.latents.encode(pipeline.components, to_pixels(images).to(self._device))
        return np.stack([np.asarray(image) for image in images]), mean.cpu().numpy(), log_variance.cpu().numpy()

    def _pipeline(self, prior: PriorSet) -> tuple[Backbone, Any]:
        wanted = (prior.backbone, prior.sampler)
        if self._loaded is None or self._loaded[0] != wanted:
            self._loaded = None  # two pipelines may not fit side by side
            backbone = self._store.open_backbone(prior.backbone)
            self._loaded = (wanted, backbone, load_pipeline(backbone, prior.sampler, self._device))
        return self._loaded[1:]
