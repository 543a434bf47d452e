"""The start of a run on one rank: its networks with base weights, or those of a checkpoint, in an engine.

Weights come tensor by tensor from mappings that need not lie in this rank's memory (`host_tensors`). No network is ever
read here, and under ZeRO stage 3 none that is trained is ever whole in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.backbones import Backbone
from dreambooth.backbones.precision import DTYPES
from dreambooth.memory import enable_gradient_checkpointing
from dreambooth.methods import METHODS
from dreambooth.methods.base import BaseWeights, Weights
from dreambooth.methods.teacher import Teacher
from dreambooth.runs import RunSpec
from pipelines.engine.engine import EMA, PARAMETER, Partition, initialize_engine, local_device, restore, restore_average


def read_base(run: RunSpec, backbone: Backbone) -> dict[str, Tensor]:
    """The float32 parameters and buffers that `build_engine` needs, from the backbone's files."""
    base: dict[str, Tensor] = {}
    for component in METHODS[run.training.method].networks(backbone, run.training.trained):
        network = backbone.load(component)
        named = [*network.named_parameters(), *network.named_buffers()]
        base |= {f"{component}.{name}": tensor.detach() for name, tensor in named}
    return base


def build_engine(
    run: RunSpec, backbone: Backbone, base: BaseWeights, state: Mapping[str, Tensor], step: int, disk: str
) -> tuple[Any, EMA | None, Teacher | None]:
    """An engine, the moving average of its weights and the teacher, where the run has them.

    `base` is what `read_base` gives. `state` is that of the checkpoint after update `step`, or empty. Every rank must
    call this: all weights may be collectives.
    """
    training, method = run.training, METHODS[run.training.method]
    precision = DTYPES[training.precision]
    networks = {name: backbone.empty(name) for name in method.networks(backbone, training.trained)}
    if training.gradient_checkpointing:
        for network in networks.values():
            enable_gradient_checkpointing(network)
    words = {"identifier": run.identifier, "class_noun": run.class_noun}
    module = method.module(backbone, networks, **words, settings=training.method_settings)
    start = method.start(module, base)

    def masters(name: str) -> Tensor:
        saved = f"{PARAMETER}.{name}"
        return state[saved] if saved in state else start(name)

    partition = Partition(training, run.lane, disk) if run.lane.zero_stage == 3 else None
    materialize(module, masters, local_device(), precision, partition)
    groups = method.parameter_groups(backbone, module, training.learning_rate, training.text_encoder_learning_rate)
    engine = initialize_engine(module, groups, training, run.lane, masters, disk)
    for name, network in method.frozen(module).items():
        materialize(network, _of(base, name), engine.device, precision)
    if training.compile:
        # torch keeps the code by what a network looks like, not by which it is: a lane's next subject finds it.
        networks[backbone.denoiser].compile(dynamic=False)
    average = EMA(engine, training.ema_decay) if training.ema_decay else None
    if state:
        restore(engine, state, step)
        if average is not None:
            restore_average(engine, average, state)
    return engine, average, _teacher(run, backbone, base, engine.device)


def _teacher(run: RunSpec, backbone: Backbone, base: Mapping[str, Tensor], device: torch.device) -> Teacher | None:
    if run.training.prior_kind != "teacher":
        return None
    denoiser = backbone.empty(backbone.denoiser)
    materialize(denoiser, _of(base, backbone.denoiser), device, DTYPES[run.training.precision])
    return Teacher(backbone, denoiser)


def _of(base: Mapping[str, Tensor], component: str) -> Weights:
    return lambda name: base[f"{component}.{name}"]


@torch.no_grad()
def materialize(
    module: nn.Module,
    weights: Weights,
    device: torch.device,
    dtype: torch.dtype,
    partition: Callable[[nn.Parameter], None] | None = None,
) -> None:
    """Give the module, which has no storage, its parameters in `dtype` and its buffers as they are, on `device`.

    With `partition`, each parameter is partitioned before the next one comes.
    """
    filled: dict[nn.Parameter, nn.Parameter] = {}
    for prefix, part in module.named_modules():
        path = f"{prefix}." if prefix else ""
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter not in filled:  # T5 holds its embeddings twice
                # A copy always: the base weights are those of the next run too.
                value = weights(path + name).to(device, dtype, copy=True)
                filled[parameter] = nn.Parameter(value, parameter.requires_grad)
                if partition is not None:
                    partition(filled[parameter])
            setattr(part, name, filled[parameter])
        for name, _ in list(part.named_buffers(recurse=False)):
            setattr(part, name, weights(path + name).to(device, copy=True))
