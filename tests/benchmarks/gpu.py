"""What fine-tuning costs on this machine's GPU: one command makes the table.

    python -m tests.benchmarks.gpu --out h100.jsonl            # SDXL and IF-I-XL at full size, 60 rows
    python -m tests.benchmarks.gpu --out small.jsonl --small   # small models, to try the command on a CPU

Weights are random, configurations the public ones; everything else is the real step on made-up rows, in bf16 and with
class-prior images. A row is a process of its own of at most ten minutes. Rows that the file holds are not run again: a
command that was stopped goes on where it was, and a file is for one kind of GPU.
"""

from __future__ import annotations

from pipelines.runtime.console import quiet_libraries

quiet_libraries()

import argparse  # noqa: E402
import json  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from dataclasses import asdict, dataclass  # noqa: E402
from itertools import product  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from dreambooth.backbones import Backbone, open_backbone  # noqa: E402
from dreambooth.common.streams import integer, normal  # noqa: E402
from dreambooth.memory import empty_inputs  # noqa: E402
from dreambooth.runs import RunSpec, Training, WorkerGroup  # noqa: E402
from dreambooth.sampling.sampler import SamplerSettings  # noqa: E402
from pipelines.planning.preflight import Preflight  # noqa: E402
from pipelines.training.batches import Minibatch  # noqa: E402
from pipelines.training.prefetch import Prefetch  # noqa: E402
from pipelines.training.setup import build_engine  # noqa: E402
from pipelines.training.train_step import passes_of, train_step  # noqa: E402
from tests.full_size import write_full_size  # noqa: E402
from tests.pipelines.engines import lane, process_group, training  # noqa: E402
from tests.small_models import write_deepfloyd_if, write_sdxl  # noqa: E402

LIMIT = 590
"""Seconds that a row may take."""
WARM_UP, TIMED = 3, 10
"""Steps before the clock runs, and while it does."""
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12}
"""Makers' dense bf16 FLOP/s, of the SXM form where there are several, by what the device's name holds."""
SMALL = {"sdxl": write_sdxl, "deepfloyd-if": write_deepfloyd_if}


@dataclass(frozen=True)
class Row:
    """A way to train; the batch is of photos, with as many class-prior images on top."""

    family: str
    batch: int
    zero_stage: int
    offload: str
    gradient_checkpointing: bool
    compile: bool


ROWS = [
    Row(family, batch, *sharding, checkpointing, compiled)
    for family, sharding, checkpointing, compiled, batch in product(
        ("sdxl", "deepfloyd-if"), ((2, "none"), (2, "cpu"), (3, "none")), (True, False), (False, True), (1, 2, 4)
    )
    if not (compiled and sharding == (3, "none"))
]


class MadeUp:
    """Rows of noise in the shapes of the real ones, drawn on the host as these are."""

    def __init__(self, backbone: Backbone, resolution: int) -> None:
        """Take the shapes from the configurations."""
        latents, _, conditioning = empty_inputs(backbone, {}, 1, resolution, torch.float32)
        self._shape, self._times = latents.shape[1:], backbone.objective.steps
        self._conditioning = {name: normal(value.shape[1:], 0, name) for name, value in conditioning.items()}

    def rows(self, step: int, samples: range) -> list[Minibatch]:
        """As `Batches` gives them."""
        return [self._half(half, step, samples) for half in ("instance", "prior")]

    def _half(self, half: str, step: int, samples: range) -> Minibatch:
        def drawn(kind: str) -> Tensor:
            return torch.stack([normal(self._shape, half, kind, step, sample) for sample in samples])

        t = torch.tensor([integer(self._times, half, "t", step, sample) for sample in samples])
        rows = {name: value.expand(len(samples), *value.shape) for name, value in self._conditioning.items()}
        return Minibatch(
            drawn("x"), drawn("epsilon"), t, {name: value.contiguous() for name, value in rows.items()}, {}
        )


def random_base(backbone: Backbone, device: torch.device) -> dict[str, Tensor]:
    """The denoiser's base weights in float32 on the CPU, such that training does not explode."""
    network = backbone.empty(backbone.denoiser).to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    network.to("cpu")
    named = [*network.named_parameters(), *network.named_buffers()]
    return {f"{backbone.denoiser}.{name}": value.detach() for name, value in named}


def training_flops(backbone: Backbone, rows: int, resolution: int) -> int:
    """Operations of a step: forward, and twice that for the backward pass; what checkpointing repeats counts not."""
    network = backbone.empty(backbone.denoiser)
    inputs = empty_inputs(backbone, {}, rows, resolution, torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone.predict(network, *inputs)
    return 3 * counter.get_total_flops()


def settings(row: Row, backbone: Backbone, on_gpu: bool) -> RunSpec:
    """The run of a row."""
    resolution = backbone.default_resolution
    chosen: Training = training(
        trained=(backbone.denoiser,),
        resolution=resolution,
        steps=WARM_UP + TIMED,
        learning_rate=1e-6,
        batch=row.batch,
        prior_weight=1.0,
        precision="bf16",
        gradient_checkpointing=row.gradient_checkpointing,
        compile=row.compile,
    )
    group: WorkerGroup = lane(zero_stage=row.zero_stage, offload=row.offload, gpus_per_worker=float(on_gpu))
    samples = SamplerSettings(resolution, steps=1, guidance=1.0, batch=1, threads=1, precision="bf16")
    named = {"subject": "made-up", "class_noun": "dog", "identifier": "sks", "token_ids": (), "images": ()}
    prompts: dict[str, Any] = {"prior": None, "samples": samples, "sample_prompts": (), "seed": 0}
    return RunSpec(**named, backbone=row.family, training=chosen, lane=group, **prompts)


def measure(row: Row, small: bool) -> dict[str, Any]:
    """Train a few steps; what it took."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    with (
        tempfile.TemporaryDirectory() as folder,
        process_group(Path(folder), backend="nccl" if on_gpu else "gloo"),
    ):
        place = Path(folder) / "backbone"
        backbone = open_backbone(SMALL[row.family](place) if small else write_full_size(place, row.family))
        run = settings(row, backbone, on_gpu)
        resolution = run.training.resolution
        found: dict[str, Any] = {"device": torch.cuda.get_device_name() if on_gpu else "CPU"}
        found["estimate"] = Preflight([(backbone, run.training)], run.lane, None).memory[0].total
        try:
            seconds, peak = _train(run, backbone, device, MadeUp(backbone, resolution))
        except torch.OutOfMemoryError:
            return found | {"failure": "out of memory"}
        flops = training_flops(backbone, 2 * row.batch, resolution) / seconds
        top = next((top for name, top in PEAK.items() if name in found["device"]), None)
        found |= {"seconds": seconds, "samples_per_second": row.batch / seconds, "peak": peak}
        return found | {"mfu": flops / top if top else None}


def _train(run: RunSpec, backbone: Backbone, device: torch.device, made_up: MadeUp) -> tuple[float, int | None]:
    """Seconds of a step, and on a GPU the peak of its memory in bytes."""
    engine, _, _ = build_engine(run, backbone, random_base(backbone, device), {}, 0, "")
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    samples = [samples for samples, _ in passes_of(run, 0, 1)]
    with Prefetch(made_up, samples, run.training.steps, device) as rows:
        for step in range(run.training.steps):
            if step == WARM_UP:
                began = _now(device)
            terms = train_step(engine, run, backbone, rows, step)
            assert terms is not None
        seconds = (_now(device) - began) / TIMED
    if not terms.isfinite().all():
        raise ArithmeticError(f"the loss is not finite: {terms.tolist()}")
    return seconds, torch.cuda.max_memory_allocated() if device.type == "cuda" else None


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def run_row(row: Row, small: bool) -> dict[str, Any]:
    """Measure a row in a process of its own, whose memory is gone with it."""
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "--row", json.dumps(asdict(row))]
    try:
        done = subprocess.run(
            [*command, "--small"] if small else command, capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failure": f"not done in {LIMIT} s"}
    if done.returncode:
        return {"failure": f"exit code {done.returncode}: {(done.stderr.strip() or '?').splitlines()[-1][:200]}"}
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))


def read(path: Path) -> dict[Row, dict[str, Any]]:
    """The rows that a file holds."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {Row(**line["row"]): line["found"] for line in map(json.loads, lines)}


def table(found: dict[Row, dict[str, Any]]) -> Iterator[str]:
    """The rows in Markdown."""
    yield ", ".join(sorted({str(one["device"]) for one in found.values() if "device" in one})) or "no row yet"
    yield ""
    yield "| model | batch | ZeRO | checkpointing | compile | samples/s | MFU | peak GiB | estimate GiB |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row, one in found.items():
        sharding = f"{row.zero_stage}" + (f", {row.offload}" if row.offload != "none" else "")
        flags = " | ".join("yes" if flag else "no" for flag in (row.gradient_checkpointing, row.compile))
        if "failure" in one:
            measured = f"{one['failure']} | – | –"
        else:
            mfu = "–" if one["mfu"] is None else f"{100 * one['mfu']:.1f} %"
            peak = "–" if one["peak"] is None else f"{one['peak'] / 2**30:.1f}"
            measured = f"{one['samples_per_second']:.2f} | {mfu} | {peak}"
        estimate = f"{one['estimate'] / 2**30:.1f}" if "estimate" in one else "–"
        yield f"| {row.family} | {row.batch} | {sharding} | {flags} | {measured} | {estimate} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"), help="file of the rows")
    parser.add_argument("--small", action="store_true", help="small models, with which a CPU is content")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row is not None:
        print(json.dumps(measure(Row(**json.loads(arguments.row)), arguments.small)))
        return
    if not (arguments.small or torch.cuda.is_available()):
        parser.error("this machine has no GPU: give --small to try the command")
    found = read(arguments.out)
    for row in ROWS:
        if row in found:
            continue
        found[row] = run_row(row, arguments.small)
        with arguments.out.open("a") as file:
            file.write(json.dumps({"row": asdict(row), "found": found[row]}) + "\n")
        print(f"{len(found)}/{len(ROWS)} {asdict(row)} {found[row]}", flush=True)
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
