"""What every training stage shares: a bounded, resumable loop, safe checkpoints, and an average of the weights."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

EMA_PREFIX, MODEL_PREFIX = "ema/", "model/"


class OutOfTimeError(Exception):
    """The time given to this call is up; the stage has saved itself and goes on at the next call."""


@dataclass(frozen=True)
class Clock:
    """When this call has to stop, in `time.monotonic` seconds, and what it computes on."""

    deadline: float
    device: torch.device
    compiled: bool = False

    def expired(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.deadline


@dataclass(frozen=True)
class Recipe:
    """How long and how fast a stage trains."""

    steps: int
    batch: int
    lr: float
    warmup: int = 200
    decay: bool = True
    weight_decay: float = 0.01
    ema: float = 0.0
    muon: bool = False

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to zero over all steps, or a constant."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if not self.decay:
            return self.lr
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def batches(count: int, batch: int, seed: int, step: int) -> np.ndarray:
    """The sample numbers of a step: each epoch is one permutation fixed by (seed, epoch)."""
    per_epoch = max(1, count // batch)
    epoch, at = divmod(step, per_epoch)
    return np.sort(_order(count, seed, epoch)[at * batch : (at + 1) * batch])


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def train(
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    recipe: Recipe,
    folder: Path,
    clock: Clock,
    every: float = 60.0,
) -> nn.Module | None:
    """Minimize `loss_of(step)` from the last checkpoint in `folder` to `recipe.steps`, saving every so many seconds.

    Returns the average of the weights (with `recipe.ema`), which holds the result then; `model` holds the last ones.
    Raises `OutOfTimeError` after saving when the clock runs out.
    """
    optimizers = Optimizers(model, recipe)
    average = _copy(model) if recipe.ema else None
    step = load_checkpoint(folder, model, optimizers, average)
    model.train()
    seen, began = 0, time.monotonic()
    saved = began
    losses: list[Tensor] = []
    while step < recipe.steps:
        loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(recipe.rate(step))
        step, seen = step + 1, seen + recipe.batch
        if average is not None:
            _average(average, model, min(recipe.ema, (1 + step) / (10 + step)))
        losses.append(loss.detach())
        if step % 100 == 0:
            rate = seen / (time.monotonic() - began)
            print(
                f"{folder.name} step {step}/{recipe.steps} loss {torch.stack(losses).mean():.4f} {rate:.0f} samples/s",
                flush=True,
            )
            losses.clear()
        if time.monotonic() > saved + every or step == recipe.steps or clock.expired():
            save_checkpoint(folder, model, optimizers, average, step)
            saved = time.monotonic()
        if clock.expired() and step < recipe.steps:
            raise OutOfTimeError(f"{folder.name} stopped at step {step} of {recipe.steps}")
    model.eval()
    return average


class Optimizers:
    """AdamW over all weights, or with `recipe.muon` Muon (Jordan et al. 2024) over the matrices inside and AdamW over
    the rest: the first and last layer, embeddings, biases and norms."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        """Optimizers without state."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
        ends = {p for name, p in model.named_parameters() if {"conv_in", "conv_out"} & set(name.split("."))}
        wide = [p for p in trained if p.ndim > 1 and p not in embeddings]
        self.inner = [p for p in wide if p not in ends] if recipe.muon else []
        inside = set(self.inner)
        # Tokens that no caption holds get no gradient: weight decay alone would shrink them all to nothing.
        groups = [
            {"params": [p for p in wide if p not in inside], "weight_decay": recipe.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1 or p in embeddings], "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.99), fused=True)
        self.all: dict[str, torch.optim.Optimizer] = {"adamw": adamw}
        # Muon knows matrices alone: a convolution is one, seen as (out, everything else).
        self.matrices = [nn.Parameter(_as_matrix(p.detach())) for p in self.inner]
        if self.matrices:
            self.all["muon"] = torch.optim.Muon(
                self.matrices, lr=recipe.lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
            )

    def step(self, rate: float) -> None:
        """Move the weights by their gradients at this learning rate, and drop the gradients."""
        for matrix, parameter in zip(self.matrices, self.inner, strict=True):
            assert parameter.grad is not None
            matrix.grad, parameter.grad = _as_matrix(parameter.grad), None
        for optimizer in self.all.values():
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """All moments by `optimizer/number/name`."""
        return {
            f"{kind}/{index}/{name}": value
            for kind, optimizer in self.all.items()
            for index, state in optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `tensors` gave."""
        for kind, optimizer in self.all.items():
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                owner, _, rest = key.partition("/")
                if owner != kind:
                    continue
                index, name = rest.split("/")
                parameter = parameters[int(index)]
                # Fused optimizers walk over parameters and moments alike: both want one memory format.
                laid_out = torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value
                state.setdefault(int(index), {})[name] = laid_out
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _as_matrix(tensor: Tensor) -> Tensor:
    """A weight or gradient as a view (out, everything else), whichever memory format it has."""
    if tensor.ndim == 4 and not tensor.is_contiguous():
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.flatten(1)


def save_checkpoint(
    folder: Path, model: nn.Module, optimizers: Optimizers | None, average: nn.Module | None, step: int
) -> None:
    """Write weights, their average and the optimizers' moments as one safetensors file, atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {MODEL_PREFIX + name: value for name, value in model.state_dict().items()}
    if average is not None:
        tensors |= {EMA_PREFIX + name: value for name, value in average.state_dict().items()}
    if optimizers is not None:
        tensors |= optimizers.tensors()
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    partial = folder / "checkpoint.part"
    save_file(tensors, partial, metadata={"step": json.dumps(step)})
    os.replace(partial, folder / "checkpoint.safetensors")


def load_checkpoint(
    folder: Path, model: nn.Module, optimizers: Optimizers | None = None, average: nn.Module | None = None
) -> int:
    """Take up the checkpoint in `folder`; returns its step, or 0 where there is none."""
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0
    tensors = load_file(path)

    def under(prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}

    model.load_state_dict(under(MODEL_PREFIX))
    if average is not None:
        average.load_state_dict(under(EMA_PREFIX))
    if optimizers is not None:
        optimizers.load(tensors)
    return checkpoint_step(folder)


def load_average(folder: Path, model: nn.Module) -> int:
    """Put the averaged weights of the checkpoint in `folder` into `model`; returns the step."""
    tensors = load_file(folder / "checkpoint.safetensors")
    model.load_state_dict({n[len(EMA_PREFIX) :]: v for n, v in tensors.items() if n.startswith(EMA_PREFIX)})
    model.eval()
    return checkpoint_step(folder)


def checkpoint_step(folder: Path) -> int:
    """The step that the checkpoint in `folder` was written at, 0 where there is none."""
    from safetensors import safe_open

    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        return int(json.loads(file.metadata()["step"]))


def chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `range(count)`."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """An array as a tensor there, without waiting for what the device still has to do.

    On a CPU it shares the array's memory, which may be a file's: a pool need not fit in.
    """
    return torch.from_numpy(array).to(device, non_blocking=True)


def to_pixels(images: Tensor) -> Tensor:
    """Pictures uint8 (N, H, W, 3) to pixels float (N, 3, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 arithmetic over fp32 weights."""
    return torch.autocast(device.type, torch.bfloat16)


def _copy(model: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def _average(average: nn.Module, model: nn.Module, keep: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in model.parameters()], 1 - keep)
    for mine, theirs in zip(average.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)
