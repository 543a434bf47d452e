"""DeepSpeed's engine, and its sharded state in a form that belongs to no ZeRO stage.

`full_state` and `restore` speak of whole float32 parameters and the optimizer's state of them by name. What they
exchange is plain tensors in safetensors files: no pickle, and nothing of how the state was sharded.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from dreambooth.runs import Training, WorkerGroup
from pipelines.engine.compiled_ops import compile_ops
from pipelines.engine.config import merged
from pipelines.engine.optimizers import MOMENTS, STATES, make_optimizer, set_state, state_of

PARAMETER, AVERAGE = "param", "average"
"""Prefixes of a parameter's name in a checkpoint: the parameter itself, and its moving average."""
LOSS_SCALER = "loss_scaler"
"""Name of the dynamic loss scaler's state in a checkpoint of a run in fp16."""
_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def engine_config(training: Training, lane: WorkerGroup, world: int, disk: str | None = None) -> dict[str, Any]:
    """DeepSpeed's configuration for `world` workers, the user's settings over ours.

    `disk` is a folder for what is offloaded to one. Clipping belongs here: done before the engine's step it would see
    shards.
    """
    micro_batches = lane.workers * training.gradient_accumulation
    micro_batch, passes = training.batch // micro_batches, math.ceil(micro_batches / world)
    zero: dict[str, Any] = {"stage": lane.zero_stage}
    if lane.offload != "none":
        place = {"device": lane.offload} | ({"nvme_path": disk} if lane.offload == "nvme" else {})
        zero["offload_optimizer"] = place
        if lane.zero_stage == 3:
            zero["offload_param"] = place
    config: dict[str, Any] = {
        "train_batch_size": micro_batch * passes * world,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": training.max_grad_norm,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": training.precision == "bf16"},
        # An overflow lowers the scale at once: the step is done again, and with the same scale it would overflow again.
        "fp16": {"enabled": training.precision == "fp16", "hysteresis": 1},
        "steps_per_print": 10**9,
    }
    if training.precision != "fp32" and passes > 1:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return merged(config, lane.deepspeed)


class Partition:
    """Partitions parameters over all ranks one after another, in the order in which they come (ZeRO stage 3)."""

    def __init__(self, training: Training, lane: WorkerGroup, disk: str | None = None) -> None:
        """Partition as the engine will expect it that is started with the same arguments."""
        compile_ops(with_async_io=lane.offload == "nvme")
        # As the engine's start does it; before that DeepSpeed checks the configuration against a world of one.
        deepspeed.init_distributed(get_accelerator().communication_backend_name())
        self._config = engine_config(training, lane, dist.get_world_size(), disk)
        self._first: Any = None

    def __call__(self, parameter: nn.Parameter) -> None:
        """Keep this rank's part of the parameter, and let the rest go; a collective."""
        if self._first is None:
            deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=self._config)
            self._first = parameter
        else:  # as DeepSpeed partitions what comes later: each Init has buffers of its own for what is on a disk
            self._first.convert_to_zero_parameters(param_list=[parameter])


def local_device() -> torch.device:
    """The device on which the engine of this rank will train; torch's current one is set when it starts."""
    return torch.device(get_accelerator().device_name(int(os.environ["LOCAL_RANK"])))


def initialize_engine(
    module: nn.Module,
    groups: Sequence[dict[str, Any]],
    training: Training,
    lane: WorkerGroup,
    masters: Callable[[str], Tensor],
    disk: str | None = None,
) -> Any:
    """Wrap `module`, all of it trained, in an engine with an optimizer.

    `groups` are the optimizer's: the parameters of `module` with their `initial_lr`, by which `set_learning_rate` goes.
    `masters` gives a parameter's float32 value by its name, which the module may have rounded, or partitioned already.
    `disk` is an empty folder of this rank, for what is offloaded to a disk.
    """
    compile_ops(with_async_io=lane.offload == "nvme")
    optimizer = make_optimizer(groups, training, lane)
    config = engine_config(training, lane, dist.get_world_size(), disk)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    if lane.zero_stage == 0 and dist.get_world_size() == 1:
        engine.enable_backward_allreduce = False  # copies all gradients to and fro, with nobody to sum them with
    if training.precision != "fp32":
        # DeepSpeed makes the masters from weights that are rounded already.
        for name, parameter in engine.module.named_parameters():
            safe_set_full_fp32_param(parameter, masters(name).to(engine.device))
    return engine


def set_learning_rate(engine: Any, factor: float) -> None:
    """Give every group of parameters its initial learning rate times `factor`."""
    for group in engine.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def gradient_norm(engine: Any) -> Tensor:
    """Norm of the last update's whole gradient before clipping, a scalar; NaN under stage 0, which does not keep it."""
    norm = engine.get_global_grad_norm()
    if isinstance(norm, Tensor):
        return norm.to(engine.device, torch.float32)
    return torch.full((), math.nan if norm is None else norm, device=engine.device)  # filled in by the device itself


def overflowed(engine: Any) -> bool:
    """Whether the last update was left out since its fp16 gradients overflowed: it is to be done again, scaled lower.

    Raises ArithmeticError when the loss is scaled no more, so that the next try would be the same.
    """
    scaler = _loss_scaler(engine)
    if scaler is None or engine.was_step_applied():
        return False
    if scaler.cur_scale <= scaler.min_scale:
        raise ArithmeticError(
            "the gradients overflow fp16 even without loss scaling; the last checkpoint is kept. Lower "
            "--learning-rate, or use --precision bf16"
        )
    return True


class EMA:
    """An exponential moving average of the float32 masters, sharded as they are."""

    def __init__(self, engine: Any, decay: float) -> None:
        """Begin with the masters as they are."""
        self._masters = list(engine.module.parameters()) if _plain_optimizer(engine) else _shards(engine)
        self._averages = [master.detach().clone() for master in self._masters]
        self._decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the masters after update `step`, counted from 1; early on the average looks back less far."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for average, master in zip(self._averages, self._masters, strict=True):
            average.lerp_(master.detach(), 1 - decay)

    @contextmanager
    def in_place_of_masters(self) -> Iterator[None]:
        """Exchange masters and averages while the block runs, so that `full_state` reads these."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, master in zip(self._averages, self._masters, strict=True):
            kept = master.detach().clone()
            master.detach().copy_(average)
            average.copy_(kept)


def full_state(engine: Any, with_moments: bool, prefix: str = PARAMETER) -> Iterator[tuple[str, Tensor]]:
    """Every parameter (`PREFIX.NAME`) in float32 and the optimizer's state of it (`exp_avg.NAME`, ...), whole.

    With the optimizer's state comes the loss scaler's, if there is one. A collective: every rank must run it to the
    end. Each tensor is dropped when the next is asked for.
    """
    plain = _plain_optimizer(engine)
    if with_moments:
        _link_moments(engine)
    for name, parameter in engine.module.named_parameters():
        yield f"{prefix}.{name}", parameter.detach() if plain else safe_get_full_fp32_param(parameter)
        if with_moments and plain:
            for state, value in state_of(plain, parameter).items():
                yield f"{state}.{name}", value
        elif with_moments:
            for moment in MOMENTS:
                yield f"{moment}.{name}", safe_get_full_optimizer_state(parameter, moment)
    if with_moments and (scaler := _loss_scaler(engine)) is not None:
        yield LOSS_SCALER, torch.tensor([getattr(scaler, name) for name in _SCALER_STATE], dtype=torch.float64)


def restore_average(engine: Any, average: EMA, state: Mapping[str, Tensor]) -> None:
    """Set the average from the tensors that `full_state` gave of it."""
    with average.in_place_of_masters(), torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            value = state[f"{AVERAGE}.{name}"].to(engine.device)
            if _plain_optimizer(engine):
                parameter.copy_(value)
            else:
                safe_set_full_fp32_param(parameter, value)


def restore(engine: Any, state: Mapping[str, Tensor], step: int) -> None:
    """Set the optimizer's state and step from the tensors of `full_state`; the module has its parameters already."""
    plain = _plain_optimizer(engine)
    if plain:
        for name, parameter in engine.module.named_parameters():
            kept = {kind: state[key] for kind in STATES if (key := f"{kind}.{name}") in state}
            set_state(plain, parameter, kept, step)
        return
    base = engine.optimizer.optimizer
    for number, shard in enumerate(_shards(engine)):
        with _in_memory(engine, number):
            # A fused AdamW wants its step beside the shard.
            base.state[shard] = {"step": torch.tensor(float(step), device=shard.device)} | {
                moment: torch.zeros_like(shard, requires_grad=False) for moment in MOMENTS
            }
    _link_moments(engine)
    for name, parameter in engine.module.named_parameters():
        for moment in MOMENTS:
            safe_set_full_optimizer_state(parameter, state[f"{moment}.{name}"].to(engine.device), moment)
    if (scaler := _loss_scaler(engine)) is not None:
        scale, *counts = state[LOSS_SCALER].tolist()
        for name, value in zip(_SCALER_STATE, (scale, *map(int, counts)), strict=True):
            setattr(scaler, name, value)
    dist.barrier()


def _link_moments(engine: Any) -> None:
    """Let parameters find their moments: DeepSpeed itself links them when the first group has made its first step."""
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _loss_scaler(engine: Any) -> Any | None:
    """DeepSpeed's dynamic loss scaler where the precision is fp16."""
    return engine.optimizer.loss_scaler if engine.fp16_enabled() else None


def _plain_optimizer(engine: Any) -> torch.optim.Optimizer | None:
    """torch's optimizer where ZeRO stage 0 uses it as it is."""
    return engine.optimizer if isinstance(engine.optimizer, torch.optim.Optimizer) else None


@contextmanager
def _in_memory(engine: Any, shard: int) -> Iterator[None]:
    """Have a shard, and the optimizer's state of it, in memory while the block runs, if they are on a disk."""
    zero = engine.optimizer
    swapped = hasattr(zero, "_swappable_optimizer_subgroup") and zero._swappable_optimizer_subgroup(shard)
    if swapped:
        zero._optimizer_states_and_gradient_swap_in(shard)
    yield
    if swapped:
        zero._optimizer_states_and_gradient_swap_out(shard)


def _shards(engine: Any) -> list[Tensor]:
    """This rank's flat float32 masters, on which the optimizer works."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(engine.optimizer, name):
            return list(getattr(engine.optimizer, name))
    raise AssertionError(f"unknown DeepSpeed optimizer {type(engine.optimizer).__name__}")
