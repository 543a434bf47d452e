"""Latents: the space in which a denoiser works, that of an autoencoder or the pixels themselves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from dreambooth.backbones.files import ModelFolder


class Latents(ABC):
    """How images become what the denoiser works on, and what sides they may have."""

    networks: ClassVar[tuple[str, ...]]
    """Component names of the networks that encode images."""

    def __init__(self, model: ModelFolder, denoiser_multiple: int) -> None:
        """`denoiser_multiple` is what the sides of latents must be multiples of, for the denoiser to take them."""
        self._model, self._denoiser_multiple = model, denoiser_multiple

    @property
    @abstractmethod
    def pixels_per_latent(self) -> int:
        """The side of the square of pixels that one latent stands for."""

    @property
    def side_multiple(self) -> int:
        """What the sides of an image must be multiples of, in pixels."""
        return self.pixels_per_latent * self._denoiser_multiple

    def check_side(self, side: int) -> None:
        """Raise ValueError unless images may have a side of so many pixels."""
        if side <= 0 or side % self.side_multiple:
            raise ValueError(
                f"a resolution of {side} does not fit this backbone: use a multiple of {self.side_multiple}"
            )

    @abstractmethod
    def shape(self, resolution: int) -> tuple[int, int, int]:
        """(channels, height, width) of the latent of a square image."""

    @abstractmethod
    def encode(self, networks: Mapping[str, Any], pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents of `pixels` (B, 3, H, W) in [-1, 1]; each (B, C, h, w) in float32."""

    @abstractmethod
    def scale(self, latents: Tensor) -> Tensor:
        """Bring encoded latents (B, C, h, w) to the scale on which the denoiser works."""

    @abstractmethod
    def unscale(self, latents: Tensor) -> Tensor:
        """Bring the denoiser's latents (B, C, h, w) back to the scale of the encoder."""


class AutoencoderLatents(Latents):
    """The latents of a variational autoencoder, `vae`."""

    networks = ("vae",)

    @cached_property
    def _config(self) -> dict[str, Any]:
        """The autoencoder's configuration, with the class's defaults where the file is silent."""
        config: Any = self._model.empty("vae").config
        return dict(config)

    @property
    def pixels_per_latent(self) -> int:
        """By how much the autoencoder makes images smaller."""
        return 2 ** (len(self._config["block_out_channels"]) - 1)

    def shape(self, resolution: int) -> tuple[int, int, int]:
        """(channels, height, width) of the latent of a square image."""
        side = resolution // self.pixels_per_latent
        return (self._config["latent_channels"], side, side)

    @torch.no_grad()
    def encode(self, networks: Mapping[str, Any], pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (B, C, h, w) of the autoencoder's posterior, in float32.

        Raises ArithmeticError when they are not finite (SDXL's autoencoder overflows in float16).
        """
        vae = networks["vae"]
        posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        if not (mean.isfinite().all() and log_variance.isfinite().all()):
            raise ArithmeticError(f"the autoencoder of {self._model.source!r} gave latents that are not finite")
        return mean, log_variance

    def _statistics(self, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """What the configuration says of the latents' mean and standard deviation, before the scaling factor."""
        config = self._config
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            mean, std = (torch.tensor(config[f"latents_{name}"]).view(1, -1, 1, 1) for name in ("mean", "std"))
            return mean.to(latents), std.to(latents)
        return (config.get("shift_factor") or 0.0), 1.0

    def scale(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) about as large as the noise."""
        mean, std = self._statistics(latents)
        return (latents - mean) * self._config["scaling_factor"] / std

    def unscale(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) as the autoencoder decodes them."""
        mean, std = self._statistics(latents)
        return latents * std / self._config["scaling_factor"] + mean


class PixelLatents(Latents):
    """Pixels, which are their own latents."""

    networks = ()

    @property
    def pixels_per_latent(self) -> int:
        """1."""
        return 1

    def shape(self, resolution: int) -> tuple[int, int, int]:
        """(3, height, width) of a square image."""
        return (3, resolution, resolution)

    def encode(self, networks: Mapping[str, Any], pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The pixels (B, 3, H, W) themselves, without variance."""
        return pixels, torch.full_like(pixels, -torch.inf)

    def scale(self, latents: Tensor) -> Tensor:
        """The pixels as they are."""
        return latents

    def unscale(self, latents: Tensor) -> Tensor:
        """The pixels as they are."""
        return latents
