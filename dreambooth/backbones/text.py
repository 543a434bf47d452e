"""Text: prompts to token ids, and token ids to what the denoiser hears."""

from __future__ import annotations

from torch import Tensor

TokenIds = dict[str, Tensor]
"""Token ids by tokenizer name, each (B, length)."""
Conditioning = dict[str, Tensor]
"""What the denoiser is conditioned on, by name; the first dimension of each is the batch."""
