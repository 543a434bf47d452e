"""The frozen teacher: the backbone's own denoiser as it was before training, whose predictions the prior term can keep.

It takes the place of the class-prior image as the target of Eq. 2's second term, on the same noisy image and prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dreambooth.backbones import Backbone, Conditioning
from dreambooth.backbones.precision import in_precision


class Teacher:
    """A copy of the denoiser that is never trained, whole on one device."""

    def __init__(self, backbone: Backbone, denoiser: nn.Module) -> None:
        """Take the backbone's `denoiser`, which is where its predictions are wanted, and in their precision."""
        self._backbone, self._denoiser = backbone, denoiser.requires_grad_(False)
        self._dtype = next(denoiser.parameters()).dtype

    @torch.no_grad()
    def __call__(self, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Its prediction for `z_t` (B, C, h, w) at times `t` (B,); same shape as `z_t`."""
        conditioning = in_precision(conditioning, self._dtype)
        return self._backbone.predict(self._denoiser, z_t.to(self._dtype), t, conditioning)
