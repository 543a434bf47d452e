"""How fast subjects are served, as ratios within one run against plain diffusers and against Ray Serve's multiplexing.

    python -m tests.benchmarks.serving overhead     # a warm subject over HTTP / the bare pipeline call; a few minutes
    python -m tests.benchmarks.serving swap         # a subject from host memory / a copy of its bytes; seconds
    python -m tests.benchmarks.serving multiplexed  # loads, and throughput at 16 clients; about 10 minutes on 2 cores
    python -m tests.benchmarks.serving memory       # 10,000 requests across 200 subjects; an hour on 2 cores

All but `swap` and `memory` serve the embedded backbone. Other work on the machine disturbs all sides of a ratio; each
is the median of several rounds, taken in turn.
"""

from __future__ import annotations

from pipelines.runtime.console import quiet_libraries

quiet_libraries()

import argparse  # noqa: E402
import asyncio  # noqa: E402
import base64  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import random  # noqa: E402
import socket  # noqa: E402
import statistics  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
import urllib.request  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import ray  # noqa: E402
import torch  # noqa: E402
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel  # noqa: E402
from ray import serve  # noqa: E402
from starlette.requests import Request  # noqa: E402
from starlette.responses import JSONResponse  # noqa: E402

from dreambooth.backbones import open_backbone  # noqa: E402
from dreambooth.backbones.precision import DTYPES  # noqa: E402
from dreambooth.embedded.build.config import UnetConfig  # noqa: E402
from dreambooth.embedded.build.unet import new_unet  # noqa: E402
from dreambooth.store import SubjectStore, Version  # noqa: E402
from serve.app import app  # noqa: E402
from serve.config import GIB, ServeConfig  # noqa: E402
from serve.engine.swap_pipeline import SwapPipeline  # noqa: E402
from serve.engine.weight_cache import DiskCache, HostCache  # noqa: E402
from tests.distributed.processes import processes  # noqa: E402
from tests.distributed.traffic import Traffic, count_reads, publish_subjects, zipf  # noqa: E402
from tests.serve.published import publish  # noqa: E402
from tests.small_models import write_sdxl  # noqa: E402
from tests.untrained import make_pipeline  # noqa: E402

SUBJECTS = [f"subject{number}" for number in range(12)]
REPLICAS, SLOTS, CLIENTS = 3, 4, 16
PROMPT, SIDE, GUIDANCE = "a sks thing", 64, 4.0


def publish_all(store: SubjectStore, folder: Path, count: int) -> list[Version]:
    backbone = open_backbone(folder)
    store.add_backbone(backbone)
    return [publish(store, backbone, SUBJECTS[number], f"{number + 1:012}", "unet") for number in range(count)]


def room(version: Version, count: float) -> float:
    """GiB of host memory for so many subjects."""
    sizes = [entry["size"] for name, entry in version.manifest["files"].items() if name.endswith(".safetensors")]
    return count * sum(sizes) / GIB


@contextmanager
def http() -> Iterator[str]:
    """Ray Serve at a free port; gives its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    niceness = {"worker_niceness": 0}  # as the bare calls have it
    ray.init(num_cpus=4, log_to_driver=False, logging_level="ERROR", _system_config=niceness)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def deploy(store: SubjectStore, **arguments: Any) -> None:
    serve.run(app(ServeConfig(store=store.root.uri, without_keys=True, **arguments)))


def ask(url: str, subject: str, steps: int) -> dict[str, Any]:
    """An answer of our application, or of the stock one: it takes the same body, and the subject as a header."""
    body = {"model": subject, "prompt": PROMPT, "seed": 1, "num_inference_steps": steps, "size": f"{SIDE}x{SIDE}"}
    headers = {"Content-Type": "application/json", "serve_multiplexed_model_id": subject}
    request = urllib.request.Request(f"{url}/v1/images/generations", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.load(response)


def bare_call(pipeline: Any, steps: int) -> Any:
    return pipeline(
        PROMPT,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        width=SIDE,
        height=SIDE,
        generator=torch.Generator().manual_seed(1),
    ).images[0]


def seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def overhead(rounds: int, steps: int) -> None:
    """A warm subject over HTTP and the bare pipeline call, in turn."""
    torch.set_num_threads(1)
    folder = open_backbone("embedded").folder
    with tempfile.TemporaryDirectory() as place, http() as url:
        store = SubjectStore(place)
        [version] = publish_all(store, folder, 1)
        unet = UNet2DConditionModel.from_pretrained(store.local_version(version), subfolder="unet")
        pipeline = StableDiffusionXLPipeline.from_pretrained(folder, unet=unet, add_watermarker=False)
        pipeline.set_progress_bar_config(disable=True)
        deploy(store)
        bare, served = [], []
        for number in range(rounds + 3):
            pair = seconds(lambda: bare_call(pipeline, steps)), seconds(lambda: ask(url, SUBJECTS[0], steps))
            if number >= 3:
                bare.append(pair[0])
                served.append(pair[1])
    extra = [b - a for a, b in zip(bare, served, strict=True)]
    print(
        f"bare call   median {statistics.median(bare):.4f} s, least {min(bare):.4f} s ({rounds} rounds, {steps} steps)"
    )
    print(f"over HTTP   median {statistics.median(served):.4f} s, least {min(served):.4f} s")
    for kind, more, of in [
        ("median of pairs", statistics.median(extra), statistics.median(bare)),
        ("least of each", min(served) - min(bare), min(bare)),
    ]:
        print(f"overhead, {kind}: {1000 * more:.1f} ms, {more / of:.1%}  wanted <= 10 ms or 5 %")


def swap(rounds: int) -> None:
    """Subjects put on in turn, and plain copies of as many bytes, in turn; the shipped U-Net's size, one thread."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        pipeline = make_pipeline()
        pipeline.unet = new_unet(UnetConfig(), 4, SIDE // 4, context=64, pooled=32)
        pipeline.register_to_config(unet=("diffusers", "UNet2DConditionModel"))
        pipeline.save_pretrained(Path(place) / "backbone")
        store = SubjectStore(Path(place) / "store")
        versions = publish_all(store, Path(place) / "backbone", 2)
        pipeline = SwapPipeline(open_backbone(Path(place) / "backbone"), torch.float32, torch.device("cpu"))
        host = HostCache(DiskCache(store, Path(place), GIB), pipeline.base, 8 * GIB)

        async def held(version: Version) -> Any:
            async with host.lease(version.subject, version.id) as tensors:
                return tensors

        async def all_held() -> list[Any]:
            return [await held(version) for version in versions]

        tensors = asyncio.run(all_held())
        size_of_one = sum(tensor.nbytes for tensor in tensors[0].values())
        source, target = (torch.ones(size_of_one, dtype=torch.uint8) for _ in range(2))
        swaps, copies = [], []
        for number in range(rounds + 3):
            which = number % 2
            pair = (
                seconds(lambda which=which: pipeline.load_version(f"{which}", tensors[which])),  # type: ignore[misc]
                seconds(lambda: target.copy_(source)),
            )
            if number >= 3:
                swaps.append(pair[0])
                copies.append(pair[1])
    print(f"{size_of_one / 2**20:.1f} MiB in {len(tensors[0])} tensors, {rounds} rounds")
    print(f"swap  median {1000 * statistics.median(swaps):.2f} ms, least {1000 * min(swaps):.2f} ms")
    print(f"copy  median {1000 * statistics.median(copies):.2f} ms, least {1000 * min(copies):.2f} ms")
    ratio = statistics.median(a / b for a, b in zip(swaps, copies, strict=True))
    print(f"swap / copy: median of pairs {ratio:.2f}, of the least {min(swaps) / min(copies):.2f}  wanted <= 1.5")


@serve.deployment(num_replicas=REPLICAS, max_ongoing_requests=CLIENTS, ray_actor_options={"num_cpus": 1})
class Stock:
    """What Ray Serve's documentation shows: a pipeline built for each subject, some kept a replica."""

    def __init__(self, store: str, backbone: str, precision: str) -> None:
        torch.set_num_threads(1)
        self._store, self._backbone, self._loads = SubjectStore(store), backbone, 0
        self._dtype = DTYPES[precision]

    @serve.multiplexed(max_num_models_per_replica=SLOTS)
    async def load(self, subject: str) -> Any:
        self._loads += 1
        [version] = self._store.versions(subject)
        folder, dtype = self._store.local_version(version), self._dtype
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype)
        pipeline = StableDiffusionXLPipeline.from_pretrained(
            self._backbone, unet=unet, add_watermarker=False, torch_dtype=dtype
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    async def __call__(self, request: Request) -> JSONResponse:
        pipeline = await self.load(serve.get_multiplexed_model_id())
        body, file = await request.json(), io.BytesIO()
        bare_call(pipeline, body["num_inference_steps"]).save(file, "PNG")
        replica = serve.get_replica_context().replica_tag
        image = base64.b64encode(file.getvalue()).decode()
        return JSONResponse({"data": [{"b64_json": image}], "replica": replica, "loads": self._loads})


def drive(url: str, requests: int, steps: int, seed: int) -> tuple[float, list[dict[str, Any]]]:
    """Images a second of 16 clients that ask for subjects by Zipf 0.8, and the answers."""
    subjects = random.Random(seed).choices(SUBJECTS, zipf(len(SUBJECTS)), k=requests)
    started = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = list(clients.map(lambda subject: ask(url, subject, steps), subjects))
    return requests / (time.perf_counter() - started), answers


def multiplexed(rounds: int, requests: int, steps: int, precision: str, batch: int) -> None:
    """Loads and throughput of three replicas with room for four of twelve subjects each, started anew each round.

    Stock replicas draw one image after another; ours draw up to `batch` of a subject together.
    """
    folder = open_backbone("embedded").folder
    rates: dict[str, list[float]] = {"stock": [], "ours": []}
    loads: dict[str, list[float]] = {"stock": [], "ours": []}
    with tempfile.TemporaryDirectory() as place, http() as url:
        store = SubjectStore(place)
        versions = publish_all(store, folder, len(SUBJECTS))
        [node] = ray.nodes()
        metrics = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for number in range(rounds):
            serve.run(Stock.bind(store.root.uri, str(folder), precision))  # type: ignore[attr-defined]
            rate, answers = drive(url, requests, steps, number)
            rates["stock"].append(rate)
            loads["stock"].append(
                sum(
                    {
                        answer["replica"]: answer["loads"] for answer in sorted(answers, key=lambda a: a["loads"])
                    }.values()
                )
            )
            serve.delete("default")
            before = count_reads(metrics)["store"]
            slots = room(versions[0], SLOTS + 0.5) * DTYPES[precision].itemsize / torch.float32.itemsize
            deploy(store, replicas=REPLICAS, host_memory=slots, precision=precision, batch=batch)
            rate, _ = drive(url, requests, steps, number)
            rates["ours"].append(rate)
            loads["ours"].append(count_reads(metrics)["store"] - before)
            serve.delete("default")
    for kind in rates:
        shown = " ".join(f"{rate:.2f}" for rate in rates[kind])
        print(f"{kind:6} {shown} images/s; loads {' '.join(f'{count:.0f}' for count in loads[kind])}")
    needed = len(SUBJECTS)
    ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates["stock"], strict=True))
    print(f"{requests} requests, {CLIENTS} clients, {steps} steps, {precision}, batches <= {batch}, {rounds} rounds")
    print(f"loads / {needed}: ours {statistics.median(loads['ours']) / needed:.2f}  wanted <= 1.25")
    print(f"loads / {needed}: stock {statistics.median(loads['stock']) / needed:.2f}")
    print(f"throughput, ours / stock: {ratio:.2f}  wanted >= 2")


def memory(requests: int) -> None:
    """MiB of the largest replica and of the ingress, ten times on the way through many requests."""
    with tempfile.TemporaryDirectory() as place, http() as url:
        subjects = publish_subjects(SubjectStore(Path(place) / "store"), write_sdxl(Path(place) / "sdxl"), 200)
        deploy(subjects.store, replicas=REPLICAS, host_memory=subjects.room(20))
        for part in range(1, 11):
            with Traffic(url, subjects.images, zipf(200), clients=6, requests=requests // 10) as traffic:
                pass
            assert traffic.right == requests // 10, (traffic.wrong[:3], traffic.others[:3])
            sizes = [
                max(process.memory_info().rss for process in processes(f"ServeReplica:default:{name}")) / 2**20
                for name in ("subjects", "Ingress")
            ]
            print(
                f"{part * requests // 10:6,} requests: replica {sizes[0]:.0f} MiB, ingress {sizes[1]:.0f} MiB",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["overhead", "swap", "multiplexed", "memory"])
    parser.add_argument("--rounds", type=int, help="by default 50; 3 of `multiplexed`")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps of an image")
    parser.add_argument("--requests", type=int, help="by default 400 a round of `multiplexed`, 10,000 of `memory`")
    parser.add_argument("--precision", choices=list(DTYPES), default="fp32", help="of both sides of `multiplexed`")
    parser.add_argument(
        "--batch", type=int, default=8, help="most images that our side of `multiplexed` draws together"
    )
    arguments = parser.parse_args()
    if arguments.what == "overhead":
        overhead(arguments.rounds or 50, arguments.steps)
    elif arguments.what == "swap":
        swap(arguments.rounds or 50)
    elif arguments.what == "multiplexed":
        rounds, requests = arguments.rounds or 3, arguments.requests or 400
        multiplexed(rounds, requests, arguments.steps, arguments.precision, arguments.batch)
    else:
        memory(arguments.requests or 10_000)


if __name__ == "__main__":
    main()
