import time

import numpy as np
import pytest
import torch
from torch import nn

from dreambooth.embedded.build.training import (
    Clock,
    Optimizers,
    OutOfTimeError,
    Recipe,
    batches,
    checkpoint_step,
    load_average,
    train,
)


def _clock(seconds: float = 1e6) -> Clock:
    return Clock(time.monotonic() + seconds, torch.device("cpu"))


class _Network(nn.Module):
    """A layer of each kind that the optimizers tell apart, in the memory format of the U-Net's training."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(1, 4, 1)
        self.inner = nn.Conv2d(4, 3, 2)
        self.weight = nn.Parameter(torch.randn(5, 3))
        self.to(memory_format=torch.channels_last)

    def forward(self, inputs):
        features = self.inner(self.conv_in(inputs.view(-1, 1, 2, 2))).flatten(1)
        return (features @ self.weight.T).sum(1, keepdim=True)


def _problem(make=lambda: nn.Linear(4, 1)):
    torch.manual_seed(0)
    model = make()
    inputs = torch.randn(64, 4)
    targets = inputs @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]])

    def loss_of(step: int) -> torch.Tensor:
        rows = batches(64, 8, seed=1, step=step)
        return (model(inputs[rows]) - targets[rows]).square().mean()

    return model, loss_of


@pytest.mark.parametrize(("make", "muon"), [(lambda: nn.Linear(4, 1), False), (_Network, True)])
def test_training_in_pieces_equals_training_at_once(tmp_path, make, muon):
    recipe = Recipe(steps=40, batch=8, lr=0.05, warmup=3, ema=0.9, muon=muon)
    whole, loss_of = _problem(make)
    train(whole, loss_of, recipe, tmp_path / "whole", _clock())

    stops = 0
    while True:
        pieces, loss_of = _problem(make)
        try:
            train(pieces, loss_of, recipe, tmp_path / "pieces", _clock(-1))
            break
        except OutOfTimeError:
            stops += 1
    assert stops == 39
    assert torch.equal(whole.weight, pieces.weight)
    averaged = [_problem(make)[0] for _ in range(2)]
    for model, name in zip(averaged, ("whole", "pieces"), strict=True):
        assert load_average(tmp_path / name, model) == 40
    assert torch.equal(averaged[0].weight, averaged[1].weight)
    assert not torch.equal(averaged[0].weight, whole.weight)


def test_muon_turns_the_inner_matrices_alone():
    """A first step of Muon has singular values near one all over; AdamW moves each number of the rest by the rate."""
    model, loss_of = _problem(_Network)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = Optimizers(model, Recipe(steps=1, batch=8, lr=0.01, weight_decay=0.0, muon=True))
    loss_of(0).backward()
    optimizers.step(0.01)
    moved = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    for name in ("inner.weight", "weight"):
        matrix = moved[name].permute(0, 2, 3, 1).flatten(1) if moved[name].ndim == 4 else moved[name]
        values = torch.linalg.svdvals(matrix) / (0.01 * 0.2 * max(matrix.shape) ** 0.5)
        values = values[: torch.linalg.matrix_rank(matrix, rtol=0.1)]
        assert values.min() > 0.6
        assert values.max() < 1.3
    for name in ("conv_in.weight", "conv_in.bias", "inner.bias"):
        assert torch.allclose(moved[name].abs(), torch.full_like(moved[name], 0.01), rtol=0.01)


def test_a_finished_stage_is_not_trained_again(tmp_path):
    recipe = Recipe(steps=5, batch=8, lr=0.05, warmup=1, ema=0.9)
    model, loss_of = _problem()
    train(model, loss_of, recipe, tmp_path, _clock())
    assert checkpoint_step(tmp_path) == 5
    again, _ = _problem()

    def never(step: int) -> torch.Tensor:
        raise AssertionError("a step of a finished stage")

    train(again, never, recipe, tmp_path, _clock())
    assert torch.equal(again.weight, model.weight)


def test_an_epoch_shows_every_sample_once_and_the_next_another_order():
    first = [batches(20, 5, seed=3, step=step) for step in range(4)]
    second = [batches(20, 5, seed=3, step=step) for step in range(4, 8)]
    for epoch in (first, second):
        assert sorted(np.concatenate(epoch).tolist()) == list(range(20))
    assert [b.tolist() for b in first] != [b.tolist() for b in second]


def test_tokens_without_gradient_keep_their_embedding(tmp_path):
    table = nn.Embedding(6, 3)
    before = table.weight.detach().clone()
    recipe = Recipe(steps=20, batch=1, lr=0.1, warmup=1, weight_decay=0.5)
    train(table, lambda _: table(torch.tensor([0, 1])).square().mean(), recipe, tmp_path, _clock())
    assert torch.equal(table.weight[2:], before[2:])
    assert not torch.equal(table.weight[:2], before[:2])


def test_the_rate_warms_up_then_falls_to_zero_or_stays():
    falling, steady = Recipe(100, 1, 1.0, warmup=10), Recipe(100, 1, 1.0, warmup=10, decay=False)
    assert falling.rate(0) == pytest.approx(0.1)
    assert falling.rate(10) == pytest.approx(1.0)
    assert falling.rate(100) == pytest.approx(0.0)
    assert steady.rate(99) == 1.0
