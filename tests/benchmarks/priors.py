"""How fast class-prior images are made, as ratios within one run, and how much memory many of them take.

    python -m tests.benchmarks.priors speed    # embedded backbone; about 10 minutes on 2 cores
    python -m tests.benchmarks.priors memory   # small SDXL at 32 px, 2,000 and 20,000 rows

Other work on the machine disturbs all sides of a ratio; each is the median of several rounds, taken in turn.
"""

from __future__ import annotations

from pipelines.runtime.console import quiet_libraries

quiet_libraries()

import argparse  # noqa: E402
import statistics  # noqa: E402
import tempfile  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from itertools import pairwise  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import ray  # noqa: E402
import torch  # noqa: E402

from dreambooth.backbones import open_backbone  # noqa: E402
from dreambooth.common.location import Location  # noqa: E402
from dreambooth.sampling.prior_set import PriorSet  # noqa: E402
from dreambooth.sampling.sampler import load_pipeline, sample, to_pixels  # noqa: E402
from dreambooth.store import SubjectStore  # noqa: E402
from pipelines.runtime.console import Display  # noqa: E402
from pipelines.stages.priors import generate_priors  # noqa: E402
from tests.prior_sets import LANE, open_store, small_sets  # noqa: E402
from tests.small_models import write_sdxl  # noqa: E402

BATCH = 8


def embedded_set() -> PriorSet:
    backbone = open_backbone("embedded")
    [prior] = small_sets(backbone.folder, ["a dog"], BATCH, steps=20, resolution=backbone.default_resolution)
    return prior


def images_a_second(finished: list[float], images: int) -> float:
    """The rate from the first quarter of the batches to the last: start-up is left out, the tail is not."""
    finished = sorted(finished)
    first = len(finished) // 4
    return (len(finished) - 1 - first) * images / (finished[-1] - finished[first])


def plain_call(pipeline: Any, prior: PriorSet, shard: int) -> None:
    """The diffusers call for a shard's images, which are thrown away."""
    pipeline(
        [prior.prompt] * BATCH,
        num_inference_steps=prior.sampler.steps,
        guidance_scale=prior.sampler.guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in prior.seeds(shard)],
    )


def bare_loop(prior: PriorSet, shards: int) -> float:
    """Images/s of a loop over the diffusers pipeline."""
    pipeline = load_pipeline(open_backbone("embedded"), prior.sampler, torch.device("cpu"))
    finished = []
    for shard in range(shards):
        plain_call(pipeline, prior, shard)
        finished.append(time.time())
    return images_a_second(finished, BATCH)


def with_samplers(prior: PriorSet, shards: int, samplers: int) -> float:
    """Images/s of the stage, by the times at which the shards were written."""
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(folder, open_backbone("embedded").folder)
        assert generate_priors(store, [(prior, shards * BATCH)], LANE, Display(), samplers) == {}
        written = [path.stat().st_mtime for path in Path(folder).glob("priors/*/*.parquet")]
    return images_a_second(written, BATCH)


def cpu_times(prior: PriorSet, shards: int) -> tuple[float, float, float]:
    """CPU seconds of a shard, which other work hardly disturbs: the plain call, our drawing, and PNG and Parquet."""
    backbone = open_backbone("embedded")
    pipeline = load_pipeline(backbone, prior.sampler, torch.device("cpu"))
    spent: list[list[float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for shard in range(shards):
            clock = [time.process_time()]
            plain_call(pipeline, prior, shard)
            clock.append(time.process_time())
            images = sample(pipeline, [prior.prompt] * BATCH, prior.seeds(shard), prior.sampler)
            mean, log_variance = backbone.latents.encode(pipeline.components, to_pixels(images))
            clock.append(time.process_time())
            pixels = np.stack([np.asarray(image) for image in images])
            prior.write_shard(Location.of(folder), shard, pixels, mean.numpy(), log_variance.numpy())
            clock.append(time.process_time())
            spent.append([after - before for before, after in pairwise(clock)])
    plain, drawing, files = (statistics.median(times) for times in zip(*spent[1:], strict=True))
    return plain, drawing, files


def speed(rounds: int, shards: int) -> None:
    prior = embedded_set()
    kinds: dict[str, Callable[[], float]] = {
        "bare loop": lambda: bare_loop(prior, shards),
        "one sampler": lambda: with_samplers(prior, shards, 1),
        "two samplers": lambda: with_samplers(prior, shards, 2),
    }
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    niceness = {"worker_niceness": 0}  # as the bare loop has it
    ray.init(num_cpus=2, log_to_driver=False, logging_level="ERROR", include_dashboard=False, _system_config=niceness)
    for _ in range(rounds):
        for kind, measure in kinds.items():
            rates[kind].append(measure())
    ray.shutdown()
    for kind, found in rates.items():
        print(f"{kind:14} {' '.join(f'{rate:6.2f}' for rate in found)}  images/s")

    def ratio(kind: str, to: str) -> float:
        return statistics.median(a / b for a, b in zip(rates[kind], rates[to], strict=True))

    print(f"{'one sampler / bare loop':40} {ratio('one sampler', 'bare loop'):6.3f}  wanted >= 0.95")
    print(f"{'two samplers / one sampler':40} {ratio('two samplers', 'one sampler'):6.3f}  wanted >= 1.7")
    plain, drawing, files = cpu_times(prior, shards)
    print(f"{'CPU time: plain call / all of a shard':40} {plain / (drawing + files):6.3f}  wanted >= 0.95")
    print(f"{'CPU time: PNG and Parquet / drawing':40} {files / drawing:6.3f}  wanted <  0.03")


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Peak MiB of this process, of its largest child, and of all together (shared pages once), while the block runs."""
    peak = {"driver": 0.0, "largest": 0.0, "all": 0.0}
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.5):
            own, shared = [], [0]
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    memory = process.memory_info()
                except psutil.NoSuchProcess:
                    continue
                own.append(memory.rss - memory.shared)
                shared.append(memory.shared)
            found = {"driver": own[0], "largest": max(own[1:], default=0), "all": sum(own) + max(shared)}
            for name, size in found.items():
                peak[name] = max(peak[name], size / 2**20)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()


def memory() -> None:
    ray.init(num_cpus=2, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    with tempfile.TemporaryDirectory() as folder:
        backbone = write_sdxl(Path(folder) / "sdxl")
        sets = small_sets(backbone, [f"a thing of kind {number}" for number in range(10)], BATCH, steps=1)
        for rows in (2_000, 20_000):
            store: SubjectStore = open_store(Path(folder) / str(rows), backbone)
            began = time.time()
            with watched() as peak:
                wanted = [(prior, rows // len(sets)) for prior in sets]
                assert generate_priors(store, wanted, LANE, Display(), samplers=2) == {}
            assert all(len(prior.present(store.root)) == rows // len(sets) // BATCH for prior in sets)
            sizes = "  ".join(f"{name} {size:,.0f} MiB" for name, size in peak.items())
            print(f"{rows:6,} rows: peak {sizes}; {time.time() - began:.0f} s")
    ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "memory"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shards", type=int, default=16, help="of 8 images, a round")
    arguments = parser.parse_args()
    if arguments.what == "speed":
        speed(arguments.rounds, arguments.shards)
    else:
        memory()


if __name__ == "__main__":
    main()
