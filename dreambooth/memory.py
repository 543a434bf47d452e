"""Memory that fine-tuning takes on one device, by part, from a backbone's configurations alone.

Parameters are counted on networks without storage (torch's meta device). Activations are what autograd keeps for the
backward pass of one such forward pass. The division by ZeRO stage follows Rajbhandari et al., "ZeRO: Memory
Optimizations Toward Training Trillion Parameter Models", SC 2020, section 3 and 5.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dreambooth.backbones import Backbone, Conditioning, LowResolution
from dreambooth.backbones.precision import DTYPES, in_precision
from dreambooth.methods import find_method

_SMALLEST_IN_8_BIT, _BLOCK_IN_8_BIT = 4096, 256
"""bitsandbytes keeps smaller tensors in 32 bits, and one float32 scale for each block of values."""

GPU_RESERVE = 3 * 2**30
"""Bytes of a GPU that ZeRO's buckets, kernels' workspaces and the driver may take beside what is counted here."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device, by part, and the bytes that offloading moves off it for each worker."""

    parameters: int
    """How many are trained."""
    frozen: int
    """Bytes of the weights of networks that take part and are not trained."""
    weights: int
    gradients: int
    optimizer_states: int
    activations: int
    offloaded: int

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.frozen + self.weights + self.gradients + self.optimizer_states + self.activations


@dataclass(frozen=True)
class Footprint:
    """What training holds, before it is known how it is shared out among workers: counts, and bytes."""

    parameters: int
    frozen: int
    weights: int
    moments: int
    activations: int
    with_average: bool
    with_summed_gradients: bool
    """Whether gradients are summed up over several backward passes, which is done in float32."""
    compiled: bool
    """Whether compiled code makes all gradients at once, so that none is shared out or moved off before others come."""

    def shared(self, zero_stage: int, workers: int, offload: str) -> MemoryPlan:
        """What of it lies on each device.

        ZeRO 1 divides the optimizer states (float32 masters, the optimizer's moments and an average of the weights) by
        the number of workers, 2 the gradients too, 3 the weights too; offloading moves the states and gradients to the
        host or its disk, and under 3 the weights.
        """
        divisor = {stage: workers if zero_stage >= stage else 1 for stage in (1, 2, 3)}
        weights = self.weights // divisor[3]
        gradients = (4 * self.parameters if self.with_summed_gradients else self.weights) // divisor[2]
        # Plain float32 training needs no second copy of the weights; every ZeRO stage keeps float32 masters.
        copies = (4 if zero_stage else 0) + (4 if self.with_average else 0)
        states = (self.parameters * copies + self.moments) // divisor[1]
        offloaded = 0
        if offload != "none":
            offloaded = states + gradients + (weights if zero_stage == 3 else 0)
            weights, gradients, states = (0 if zero_stage == 3 else weights), 0, 0
        if self.compiled:
            gradients = max(gradients, self.weights)
        return MemoryPlan(self.parameters, self.frozen, weights, gradients, states, self.activations, offloaded)


def footprint(
    backbone: Backbone,
    *,
    method: str = "dreambooth",
    trained: Sequence[str],
    rows: int,
    resolution: int,
    precision: str,
    gradient_checkpointing: bool,
    gradient_accumulation: int = 1,
    optimizer: str = "adamw",
    ema: bool = False,
    teacher: bool = False,
    compiled: bool = False,
) -> Footprint:
    """Measure what it takes to train the components `trained` by a method, with `rows` images in one forward pass.

    `ema` keeps an average of the weights; a `teacher`, a frozen copy of the denoiser, lies whole on every device.
    """
    dtype, how = DTYPES[precision], find_method(method)
    networks = {name: backbone.empty(name).to(dtype) for name in how.networks(backbone, trained)}
    if gradient_checkpointing:
        for network in networks.values():
            enable_gradient_checkpointing(network)
    held = how.holdings(backbone, networks)
    shapes, frozen = held.trained, held.frozen * dtype.itemsize
    parameters = sum(shape.numel() for shape in shapes)
    if teacher:
        frozen += dtype.itemsize * sum(parameter.numel() for parameter in networks[backbone.denoiser].parameters())
    return Footprint(
        parameters=parameters,
        frozen=frozen,
        weights=parameters * dtype.itemsize,
        moments=sum(moment_bytes(shape, optimizer) for shape in shapes),
        activations=activation_bytes(backbone, networks, rows, resolution, dtype),
        with_average=ema,
        with_summed_gradients=gradient_accumulation > 1,
        compiled=compiled,
    )


def plan_memory(backbone: Backbone, *, zero_stage: int, workers: int, offload: str, **settings: Any) -> MemoryPlan:
    """The memory of each device when `workers` train with the `settings` of `footprint`."""
    return footprint(backbone, **settings).shared(zero_stage, workers, offload)


def moment_bytes(shape: torch.Size, optimizer: str) -> int:
    """Bytes of the moments that the optimizer keeps of a parameter of this shape."""
    count = shape.numel()
    if optimizer == "adafactor":  # the second moment alone, of matrices (the last two dimensions) by row and column
        return 4 * (count if len(shape) < 2 else count // shape[-1] + count // shape[-2])
    if optimizer == "adamw-8bit" and count >= _SMALLEST_IN_8_BIT:
        return 2 * (count + 4 * math.ceil(count / _BLOCK_IN_8_BIT))
    return 8 * count


def enable_gradient_checkpointing(network: Any) -> None:
    """Recompute the network's blocks in the backward pass; diffusers and transformers name the switch differently."""
    if hasattr(network, "enable_gradient_checkpointing"):
        network.enable_gradient_checkpointing()
    else:
        network.activation_checkpointing_enable()
    network.train()  # both libraries checkpoint in training mode only


def activation_bytes(
    backbone: Backbone, networks: dict[str, nn.Module], rows: int, resolution: int, dtype: torch.dtype
) -> int:
    """Bytes that autograd keeps for the backward pass of one forward pass over `rows` images."""
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = (storage.nbytes(), tensor)  # the tensor keeps its storage's address from being reused
        return tensor

    with _fused_attention(), saved_tensors_hooks(keep, lambda tensor: tensor):
        backbone.predict(networks[backbone.denoiser], *empty_inputs(backbone, networks, rows, resolution, dtype))
    weights = {p.untyped_storage()._cdata for network in networks.values() for p in network.parameters()}
    return sum(size for address, (size, _) in kept.items() if address not in weights)


def empty_inputs(
    backbone: Backbone, networks: dict[str, nn.Module], rows: int, resolution: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Conditioning]:
    """z_t (rows, C, h, w), t (rows,) and conditioning without storage; gradients flow into encoders of `networks`."""
    encoders = {name: networks.get(name) or backbone.empty(name) for name in backbone.text_encoders}
    ids = {name: value.to("meta") for name, value in backbone.text.tokenize([""] * rows).items()}
    with torch.device("meta"):
        with torch.set_grad_enabled(any(name in networks for name in backbone.text_encoders)):
            conditioning: Conditioning = backbone.text.encode(encoders, ids)
        size = (resolution, resolution)
        for name, value in backbone.size_conditioning(size, (0, 0), size).items():
            conditioning[name] = value.to("meta").expand(rows, *value.shape)
        latents = torch.empty(rows, *backbone.latents.shape(resolution), dtype=dtype)
        conditioning |= backbone.image_conditioning(latents, latents, LowResolution(resolution, 0))
        return latents, torch.empty(rows, dtype=torch.long), in_precision(conditioning, dtype)


class _FusedAttention(torch.autograd.Function):
    """Keeps what fused kernels keep: queries, keys, values and the output, not the attention matrix."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Let the meta device count attention as the fused kernels of CPU and GPU do; its own is the plain formula."""

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return _FusedAttention.apply(query, key, value)

    plain = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = plain
