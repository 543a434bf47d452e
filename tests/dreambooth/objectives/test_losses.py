"""Eq. 1 and Eq. 2: both terms, each weighted by its own times."""

from __future__ import annotations

import pytest
import torch

from dreambooth.objectives.losses import denoising_loss, prior_preservation_loss

ROW = (1, 1, 1)


def test_each_half_is_weighted_by_its_own_times() -> None:
    target = torch.zeros(5, 2, 2, 2)
    prediction = torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0]).view(-1, *ROW).expand_as(target)
    weight = torch.tensor([2.0, 1.0, 10.0, 20.0, 30.0])
    halves = (each.split([2, 3]) for each in (prediction, target, weight))
    loss = prior_preservation_loss(*halves, prior_weight=0.5)
    assert loss.instance.item() == pytest.approx((2 * 1 + 1 * 4) / 2)
    assert loss.prior is not None
    assert loss.prior.item() == pytest.approx((10 * 9 + 20 * 1 + 30 * 4) / 3, rel=1e-6)
    assert loss.total.item() == pytest.approx(loss.instance.item() + 0.5 * loss.prior.item())


def test_without_class_prior_rows_the_loss_is_the_instance_term() -> None:
    prediction, target, weight = torch.ones(2, 3), torch.zeros(2, 3), torch.tensor([1.0, 3.0])
    loss = prior_preservation_loss([prediction], [target], [weight], prior_weight=1.0)
    assert loss.prior is None
    assert loss.total.item() == loss.instance.item() == 2.0


def test_the_loss_is_computed_in_float32() -> None:
    prediction, target = torch.ones(1, 4096, dtype=torch.bfloat16), torch.full((1, 4096), 1.001)  # in bfloat16, 1
    loss = denoising_loss(prediction, target, torch.ones(1))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1e-6, rel=1e-3)
