"""The variance-preserving objective of Stable Diffusion, SDXL and DeepFloyd IF: z_t = alpha_t x + sigma_t epsilon.

Networks that predict epsilon or v are trained on that target; with plain weights the squared error is taken in the
network's own prediction space, which is Eq. 1 of Ruiz et al. up to a weight w_t.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from dreambooth.common.streams import Key, integer
from dreambooth.objectives.base import Objective

Prediction = Literal["epsilon", "v_prediction", "sample"]
PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class VariancePreserving(Objective):
    """alpha_t and sigma_t for t = 0 ... T-1, and what the network predicts.

    `alphas_cumprod` has shape (T,) and holds alpha_t squared, as diffusers names it.
    """

    alphas_cumprod: Tensor
    prediction: Prediction
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Reject a prediction type that has no target."""
        if self.prediction not in PREDICTIONS:
            raise ValueError(
                f"the scheduler predicts {self.prediction!r}, which is not trainable here: use one of {PREDICTIONS}"
            )

    @classmethod
    def from_scheduler(cls, config: Mapping[str, Any]) -> VariancePreserving | None:
        """The noise schedule and prediction type that a scheduler with betas states."""
        if "beta_start" not in config:
            return None
        scheduler = DDPMScheduler.from_config(dict(config))
        return cls(scheduler.alphas_cumprod, scheduler.config.prediction_type)

    @property
    def steps(self) -> int:
        """T, the number of diffusion times."""
        return len(self.alphas_cumprod)

    def _alphas_cumprod_on(self, device: torch.device) -> Tensor:
        """A copy on the device, made once: to make one, the host waits for all that the device has to do."""
        if device not in self._copies:
            self._copies[device] = self.alphas_cumprod.to(device)
        return self._copies[device]

    def alpha_sigma(self, t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t of the times `t` (B,), shaped (B, 1, ...) to multiply a tensor of `ndim` dimensions."""
        alpha_squared = self._alphas_cumprod_on(t.device)[t].view(-1, *[1] * (ndim - 1))
        return alpha_squared.sqrt(), (1 - alpha_squared).sqrt()

    def draw_t(self, *key: Key) -> int:
        """A time of 0 ... T-1, each as likely."""
        return integer(self.steps, *key)

    def add_noise(self, x: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
        """z_t = alpha_t x + sigma_t epsilon, shape (B, ...)."""
        alpha, sigma = self.alpha_sigma(t, x.ndim)
        return alpha * x + sigma * epsilon

    def target(self, x: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
        """What the network should say for z_t, shape (B, ...): epsilon, v = alpha_t epsilon - sigma_t x, or x."""
        if self.prediction == "epsilon":
            return epsilon
        if self.prediction == "sample":
            return x
        alpha, sigma = self.alpha_sigma(t, x.ndim)
        return alpha * epsilon - sigma * x

    def weight(self, t: Tensor, min_snr_gamma: float | None = None) -> Tensor:
        """w_t of the squared error in prediction space, shape (B,): 1, or min-SNR (Hang et al., ICCV 2023).

        With snr = alpha_t^2 / sigma_t^2, min-SNR weights the error in x by min(snr, gamma), which is
        min(snr, gamma) / snr for epsilon and min(snr, gamma) / (snr + 1) for v.
        """
        if min_snr_gamma is None:
            return torch.ones(len(t), device=t.device)
        alpha_squared = self._alphas_cumprod_on(t.device)[t].float()
        snr = alpha_squared / (1 - alpha_squared)
        # alpha_t = 0 (zero terminal SNR) leaves no x to predict: min(snr, gamma) / snr has the limit 1 there.
        ratio = torch.where(snr > 0, snr.clamp(max=min_snr_gamma) / snr, torch.ones_like(snr))
        if self.prediction == "epsilon":
            return ratio
        if self.prediction == "sample":
            return snr.clamp(max=min_snr_gamma)
        return snr.clamp(max=min_snr_gamma) / (snr + 1)

    def estimate_x(self, z_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """x-hat, shape (B, ...): what z_t would be without the noise that the network sees in it.

        At alpha_t = 0 (zero terminal SNR) an epsilon prediction says nothing of x, and the estimate is not finite.
        """
        if self.prediction == "sample":
            return prediction
        alpha, sigma = self.alpha_sigma(t, z_t.ndim)
        if self.prediction == "epsilon":
            return (z_t - sigma * prediction) / alpha
        return alpha * z_t - sigma * prediction
