"""What a network learns of noisy images: the protocol that every objective fills in.

Symbols are the paper's (Ruiz et al., section 3.1): x an image or latent, epsilon ~ N(0, I), and z_t the noisy image at
time t. All tensors have the batch first, (B, ...); times and weights are (B,).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dreambooth.common.streams import Key


class Objective(ABC):
    """Draws times, lays noise on images, and says what the network should answer and how much each answer counts."""

    @classmethod
    @abstractmethod
    def from_scheduler(cls, config: Mapping[str, Any]) -> Objective | None:
        """The objective of a diffusers scheduler by its configuration; None when it is another's.

        Raises ValueError when it is this objective's and cannot be trained by.
        """

    @abstractmethod
    def draw_t(self, *key: Key) -> float:
        """The time of one sample, drawn by the stream of this key."""

    @abstractmethod
    def add_noise(self, x: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
        """The noisy images z_t."""

    @abstractmethod
    def target(self, x: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
        """What the network should answer for z_t."""

    @abstractmethod
    def weight(self, t: Tensor, min_snr_gamma: float | None = None) -> Tensor:
        """w_t of the squared error in the network's answer; `min_snr_gamma` as of Hang et al., ICCV 2023."""

    @abstractmethod
    def estimate_x(self, z_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The clean images that the network's answer stands for, x-hat of Eq. 1."""
