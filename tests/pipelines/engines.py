"""DeepSpeed engines over small networks, in a process group of this one process: no Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dreambooth.backbones.precision import DTYPES
from dreambooth.runs import Training, WorkerGroup
from pipelines.engine.engine import full_state, initialize_engine, overflowed, set_learning_rate

RATE = 1e-2


def training(**chosen: Any) -> Training:
    """Settings for an engine, `chosen` and else plain."""
    settings: dict[str, Any] = {
        **{
            "method": "dreambooth",
            "trained": ("unet",),
            "resolution": 32,
            "steps": 10,
            "schedule": "constant",
            "warmup_steps": 0,
        },
        **{"learning_rate": RATE, "text_encoder_learning_rate": 0.0, "batch": 4, "gradient_accumulation": 1},
        **{"prior_weight": 0.0, "prior_images": 0, "min_snr_gamma": None, "offset_noise": 0.0, "ema_decay": 0.0},
        **{"weight_decay": 1e-2, "max_grad_norm": 1.0, "optimizer": "adamw", "precision": "fp32"},
        "gradient_checkpointing": False,
    }
    return Training(**settings | chosen)


def lane(**chosen: Any) -> WorkerGroup:
    """A worker group of one process, `chosen` and else plain."""
    settings = {"workers": 1, "cpus_per_worker": 1, "gpus_per_worker": 0.0, "zero_stage": 2, "offload": "none"}
    return WorkerGroup(**settings | chosen)


@contextmanager
def process_group(folder: Path, rank: int = 0, world: int = 1, backend: str = "gloo") -> Iterator[None]:
    """torch's process group as Ray Train makes it, and DeepSpeed's over it."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", world)):
            environment.setenv(name, str(value))
        dist.init_process_group(backend, init_method=f"file://{folder / 'group'}", rank=rank, world_size=world)
        try:
            yield
        finally:
            deepspeed.comm.destroy_process_group()
            assert not dist.is_initialized()


def masters_of(module: nn.Module) -> Callable[[str], Tensor]:
    """The module's parameters by name, as they are now."""
    return {name: value.detach().clone() for name, value in module.named_parameters()}.__getitem__


class Learner:
    """A small network in an engine, which learns to give back what it gets."""

    def __init__(
        self,
        training: Training,
        lane: WorkerGroup,
        parameters: dict[str, Tensor] | None = None,
        width: int = 96,
        disk: Path | None = None,
    ) -> None:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(8, width), nn.GELU(), nn.Linear(width, 8))
        if parameters is not None:
            module.load_state_dict(parameters)
        rates = {"lr": training.learning_rate, "initial_lr": training.learning_rate}
        groups = [{"params": [*module[0].parameters()], **rates}, {"params": [*module[2].parameters()], **rates}]
        self.engine = initialize_engine(module, groups, training, lane, masters_of(module), str(disk))
        self._training = training
        self.overflows = 0

    def learn(self, steps: range, scale: float = 1.0) -> list[float]:
        """Do the steps as fine-tuning does; gives the loss of each, multiplied with `scale` for its gradients."""
        losses = []
        accumulated = self._training.gradient_accumulation
        for step in steps:
            set_learning_rate(self.engine, 1 / (1 + step))
            while True:
                for micro_step in range(accumulated):
                    x = torch.randn(4 // accumulated, 8, generator=torch.Generator().manual_seed(9 * step + micro_step))
                    loss = (self.engine(x.to(DTYPES[self._training.precision])).float() - x).square().mean()
                    self.engine.backward(scale * loss)
                    self.engine.step()
                if not overflowed(self.engine):
                    break
                self.overflows += 1
            losses.append(loss.item())
        return losses

    def state(self) -> dict[str, Tensor]:
        """A copy of everything that a checkpoint holds."""
        return {name: value.detach().clone() for name, value in full_state(self.engine, with_moments=True)}


def parameters_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a state, by their names in the network."""
    return {name.removeprefix("param."): value for name, value in state.items() if name.startswith("param.")}
