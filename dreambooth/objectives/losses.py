"""The loss of DreamBooth (Ruiz et al., section 3.1 and 3.3): Eq. 1 for one term, Eq. 2 with prior preservation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


def denoising_loss(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Eq. 1: the mean over the batch of w_t ||prediction - target||^2, a scalar; the norm is a mean over elements.

    `prediction` and `target` have shape (B, ...), `weight` (B,). Computed in float32 whatever the network's precision.
    """
    squared_error = (prediction.float() - target.float()).square().flatten(1).mean(1)
    return (weight * squared_error).mean()


@dataclass(frozen=True)
class PriorPreservationLoss:
    """The two terms of Eq. 2, scalars, and lambda; `prior` is None when training without class-prior images."""

    instance: Tensor
    prior: Tensor | None
    prior_weight: float

    @property
    def total(self) -> Tensor:
        """instance + lambda * prior."""
        return self.instance if self.prior is None else self.instance + self.prior_weight * self.prior


def prior_preservation_loss(
    predictions: Sequence[Tensor], targets: Sequence[Tensor], weights: Sequence[Tensor], *, prior_weight: float
) -> PriorPreservationLoss:
    """Eq. 2 over the halves of one batch: the subject's photos and, where there is such a term, class-prior images.

    Both terms are weighted by their own timesteps. Of a half, prediction and target are (B, ...), the weight is (B,).
    """
    instance, *prior = map(denoising_loss, predictions, targets, weights)
    return PriorPreservationLoss(instance, prior[0] if prior else None, prior_weight)
