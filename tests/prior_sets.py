"""Class-prior sets for tests: small ones, the bytes that they must hold, and what a whole one is."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import ray

from dreambooth.backbones import open_backbone
from dreambooth.common.location import Location
from dreambooth.runs import WorkerGroup
from dreambooth.sampling.prior_set import PriorSet
from dreambooth.sampling.sampler import SamplerSettings
from dreambooth.store import SubjectStore
from pipelines.runtime.console import Display
from pipelines.stages.priors import ClassPriorSampler, generate_priors

LANE = WorkerGroup(workers=1, cpus_per_worker=1, gpus_per_worker=0.0, zero_stage=2, offload="none")
PROMPTS = ("a dog", "a mug", "a stuffed animal")


def small_sets(
    backbone: Path, prompts: Iterable[str] = PROMPTS, batch: int = 4, steps: int = 4, resolution: int = 32
) -> list[PriorSet]:
    """One set a prompt, drawn by the paper's ancestral sampler."""
    sampler = SamplerSettings(
        resolution=resolution,
        steps=steps,
        guidance=5.0,
        batch=batch,
        threads=1,
        precision="fp32",
        scheduler="EulerAncestralDiscreteScheduler",
    )
    return [PriorSet(open_backbone(backbone).hash, prompt, sampler, seed=0) for prompt in prompts]


def open_store(place: Location | Path | str, *backbones: Path) -> SubjectStore:
    """A store that holds the backbones."""
    store = SubjectStore(place)
    for backbone in backbones:
        store.add_backbone(open_backbone(backbone))
    return store


def shards(root: Location, prior: PriorSet) -> dict[str, bytes]:
    """The shards of a set in a store, by name."""
    place = prior.location(root)
    return {name: (place / name).read_bytes() for name in place.names() if name.endswith(".parquet")}


def undisturbed(store: SubjectStore, sets: Sequence[PriorSet], count: int) -> dict[str, dict[str, bytes]]:
    """The shards of each set, by its key, made one after another in this process."""
    sampler = ClassPriorSampler(store.root.uri, {prior.key: prior for prior in sets})
    for prior in sets:
        for shard in prior.shards(count):
            assert sampler({"set": prior.key, "shard": shard})["failure"] == ""
    return {prior.key: shards(store.root, prior) for prior in sets}


def assert_whole(
    store: SubjectStore, sets: Sequence[PriorSet], count: int, expected: dict[str, dict[str, bytes]]
) -> None:
    """Every set holds exactly the expected bytes, each image once."""
    assert sorted((store.root / "priors").names()) == sorted(prior.key for prior in sets)
    for prior in sets:
        assert shards(store.root, prior) == expected[prior.key]
        ids = [row["id"] for row in prior.rows(store.root, count, ["id"])]
        assert ids == [f"{prior.key}-{index:06d}" for index in range(count)]


def main() -> int:
    """A driver of its own, to be killed or doubled: make small sets in a store that holds the backbone."""
    parser = argparse.ArgumentParser()
    parser.add_argument("store")
    parser.add_argument("backbone", type=Path)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--samplers", type=int, default=1)
    parser.add_argument("--address", default="local")
    arguments = parser.parse_args()
    ray.init(address=arguments.address, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    wanted = [(prior, arguments.count) for prior in small_sets(arguments.backbone, steps=arguments.steps)]
    failures = generate_priors(SubjectStore(arguments.store), wanted, LANE, Display(), arguments.samplers)
    ray.shutdown()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
