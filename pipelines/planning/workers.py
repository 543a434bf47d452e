"""Workers, ZeRO and precision: resolved from the options, and checked against what DeepSpeed can do with them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import psutil
import torch

from dreambooth.backbones import Backbone, DeepFloydIF
from dreambooth.backbones.presets import MACHINES, MachinePreset
from dreambooth.runs import Training, WorkerGroup
from pipelines.engine.config import read_deepspeed_config
from pipelines.planning.options import Options

GIB = 2**30


def make_lane(options: Options, preset: MachinePreset | None) -> WorkerGroup:
    """The worker group that `options` ask for: else the preset's, or one worker a local GPU, or 2 on the CPU.

    Raises ValueError when the file of DeepSpeed settings is not one, or sets what is not its to set.
    """
    chosen, gpus = options.cluster, gpus_per_worker(options)
    workers = MACHINES[chosen.preset].gpus if chosen.preset else 0
    if not workers:
        workers = max(1, torch.cuda.device_count()) if gpus else min(2, psutil.cpu_count() or 1)
    workers = chosen.workers or workers
    zero_stage = preset.zero_stage if preset else _default_zero_stage(options, workers, gpus)
    if chosen.zero_stage is not None:
        zero_stage = chosen.zero_stage
    if chosen.min_workers is not None and chosen.min_workers > workers:
        raise ValueError(f"--min-workers {chosen.min_workers} is more than --workers {workers}: give fewer, or none")
    return WorkerGroup(
        workers=workers,
        cpus_per_worker=chosen.cpus_per_worker,
        gpus_per_worker=gpus,
        zero_stage=zero_stage,
        offload=chosen.offload or (preset.offload if preset else "none"),
        deepspeed={} if chosen.deepspeed is None else read_deepspeed_config(chosen.deepspeed, zero_stage),
    )


def _default_zero_stage(options: Options, workers: int, gpus: float) -> int:
    """2, and 0 where there is nothing to shard, to round or to offload: there it only costs copies of the gradients."""
    rounds = (options.training.precision or ("bf16" if gpus else "fp32")) != "fp32"
    return 2 if workers > 1 or rounds or options.cluster.offload in ("cpu", "nvme") else 0


def check_nvme_path(options: Options, lane: WorkerGroup) -> None:
    """Raise ValueError unless a folder for offloading is given where, and only where, it is needed."""
    path = options.cluster.nvme_path
    if (lane.offload == "nvme") != (path is not None):
        raise ValueError("--offload nvme and --nvme-path FOLDER need each other")
    if path is not None and not Path(path).is_dir():
        raise ValueError(f"--nvme-path {path} is no folder: it must be there on every node, on a disk of its own")


def gpus_per_worker(options: Options) -> float:
    """GPUs of a worker: as many as asked for, or one where there is a preset or this machine has any."""
    if options.cluster.gpus_per_worker is not None:
        return options.cluster.gpus_per_worker
    return 1.0 if options.cluster.preset or torch.cuda.is_available() else 0.0


def device_bytes(options: Options, lane: WorkerGroup) -> int | None:
    """Memory that one worker may use; None when it is a GPU of which nothing is known here."""
    if options.cluster.device_memory is not None:
        return int(options.cluster.device_memory * GIB)
    if not lane.gpus_per_worker:
        return psutil.virtual_memory().total // lane.workers
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return MACHINES[options.cluster.preset].bytes if options.cluster.preset else None


def check_engine(backbone: Backbone, training: Training, lane: WorkerGroup) -> None:
    """Raise ValueError, naming the option, unless DeepSpeed can train so and its state can be saved and read back."""
    if lane.offload != "none" and lane.zero_stage == 0:
        raise ValueError(f"--offload {lane.offload} needs --zero-stage 1, 2 or 3")
    if lane.offload == "nvme":
        _check_nvme(training, lane)
    _check_optimizer(training, lane)
    if training.compile and lane.zero_stage == 3:
        raise ValueError(
            "--compile needs --zero-stage 0, 1 or 2: under 3 DeepSpeed gathers weights between all layers, where "
            "compiled code would have to be cut apart"
        )
    if training.precision != "fp32" and lane.zero_stage == 0:
        raise ValueError(
            f"--precision {training.precision} needs --zero-stage 1, 2 or 3, which keep float32 masters of the weights"
        )
    if training.precision == "fp16":
        _check_fp16(backbone, training, lane)


def _check_nvme(training: Training, lane: WorkerGroup) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if lane.zero_stage != 3:
        raise ValueError(f"--offload nvme needs --zero-stage 3: under {lane.zero_stage} DeepSpeed would not do it")
    if training.ema_decay:
        raise ValueError("--offload nvme keeps no average of weights that are not in memory: leave out --ema-decay")
    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ValueError(
            "--offload nvme needs DeepSpeed's asynchronous I/O, which cannot be compiled here: install libaio's "
            "headers (apt-get install libaio-dev) on every node, or use --offload cpu"
        )


def _check_optimizer(training: Training, lane: WorkerGroup) -> None:
    name = training.optimizer
    if name == "adamw":
        return
    if lane.zero_stage or training.precision != "fp32":
        raise ValueError(
            f"--optimizer {name} needs --zero-stage 0 and --precision fp32: its state belongs to whole tensors, and "
            f"ZeRO {lane.zero_stage} in {training.precision} would give it flat pieces of many"
        )
    if name == "adamw-8bit":
        if not lane.gpus_per_worker:
            raise ValueError("--optimizer adamw-8bit needs a GPU: give --gpus-per-worker 1, or use adafactor")
        if find_spec("bitsandbytes") is None:
            raise ValueError("--optimizer adamw-8bit needs bitsandbytes: pip install 'dreambooth[8bit]' on every node")


def _check_fp16(backbone: Backbone, training: Training, lane: WorkerGroup) -> None:
    if not lane.gpus_per_worker:
        raise ValueError("--precision fp16 needs GPUs, as DeepSpeed does: use bf16, or give --gpus-per-worker 1")
    if isinstance(backbone, DeepFloydIF) and training.trained != (backbone.denoiser,):
        raise ValueError("--precision fp16 overflows in T5: use bf16, or leave out --train-text-encoder")
