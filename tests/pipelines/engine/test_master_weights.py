"""800 updates at DreamBooth's learning rate: bf16 with float32 masters learns as float32 does, bf16 alone not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from pipelines.engine.engine import full_state, initialize_engine
from tests.pipelines.engines import lane, masters_of, parameters_of, process_group, training

STEPS, RATE = 800, 5e-6


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with process_group(tmp_path_factory.mktemp("world")):
        yield


def network() -> nn.Module:
    """Weights of the size that backbones have, N(0, 0.02)."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    return module


def photos() -> Iterator[Tensor]:
    """The same few inputs over and over, as DreamBooth has them."""
    few = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    for _ in range(STEPS):
        yield few


def loss_of(prediction: Tensor, wanted: Tensor) -> Tensor:
    return (prediction.float() - wanted.flip(0)).square().mean()


def trained_by_engine(precision: str, zero_stage: int) -> dict[str, Tensor]:
    module = network()
    settings = training(precision=precision, learning_rate=RATE, steps=STEPS, weight_decay=0.0)
    groups = [{"params": list(module.parameters()), "lr": RATE, "initial_lr": RATE}]
    engine = initialize_engine(module, groups, settings, lane(zero_stage=zero_stage), masters_of(module))
    for x in photos():
        engine.backward(loss_of(engine(x.to(next(module.parameters()).dtype)), x))
        engine.step()
    return parameters_of({name: value.clone() for name, value in full_state(engine, with_moments=False)})


def trained_in_bf16_alone() -> dict[str, Tensor]:
    module = network().bfloat16()
    optimizer = torch.optim.AdamW(module.parameters(), lr=RATE, weight_decay=0.0)
    for x in photos():
        optimizer.zero_grad()
        loss_of(module(x.bfloat16()), x).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    return {name: value.detach().float() for name, value in module.named_parameters()}


def moved(after: dict[str, Tensor], before: nn.Module) -> Tensor:
    """By how much each weight has moved, in one row."""
    return torch.cat([(after[name] - value.detach().float()).flatten() for name, value in before.named_parameters()])


@pytest.fixture(scope="module")
def exact(one_process: None) -> Tensor:
    """What float32 training does."""
    return moved(trained_by_engine("fp32", 0), network())


def test_bf16_alone_stands_still(exact: Tensor) -> None:
    # AdamW moves a weight whose gradient keeps its sign by the learning rate each time: by 4e-3 in all.
    assert exact.abs().median() > 0.5 * STEPS * RATE
    alone = moved(trained_in_bf16_alone(), network().bfloat16())
    # The rate is less than half the distance between two bf16 numbers of most weights' size: updates are rounded away.
    assert (alone == 0).float().mean() > 0.75
    assert alone.norm() < 0.3 * exact.norm()


@pytest.mark.parametrize(
    "zero_stage", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_bf16_with_masters_moves_the_weights_as_float32_does(exact: Tensor, zero_stage: int) -> None:
    with_masters = moved(trained_by_engine("bf16", zero_stage), network())
    assert torch.cosine_similarity(with_masters, exact, dim=0) > 0.99
    assert with_masters.norm().item() == pytest.approx(exact.norm().item(), rel=0.02)
