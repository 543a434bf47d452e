"""Text: prompts to token ids, and token ids to what the denoiser is conditioned on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor, nn

from dreambooth.backbones.files import ModelFolder

TokenIds = dict[str, Tensor]
"""Token ids by tokenizer name, each (B, length)."""
Conditioning = dict[str, Tensor]
"""What the denoiser is conditioned on, by name; the first dimension of each is the batch."""


class Text(ABC):
    """The tokenizers and text encoders of a backbone, and how they are used."""

    encoders: ClassVar[tuple[str, ...]]
    """Component names of the text encoders."""
    tokenizer_names: ClassVar[tuple[str, ...]]
    """Component names of their tokenizers, in the same order."""

    def __init__(self, model: ModelFolder) -> None:
        """Read nothing before it is needed."""
        self._model = model

    @cached_property
    def tokenizers(self) -> dict[str, Any]:
        """The tokenizers by name."""
        return {name: self._model.load_tokenizer(name) for name in self.tokenizer_names}

    def clean(self, prompt: str) -> str:
        """The prompt as the tokenizers see it, by what diffusers' pipeline makes of it first."""
        return prompt

    def length(self, tokenizer: Any) -> int:
        """The tokens of a prompt, padding included."""
        return tokenizer.model_max_length

    def tokenize(self, prompts: Sequence[str]) -> TokenIds:
        """Token ids of the prompts for every tokenizer, padded to its full length as diffusers' pipelines do.

        Raises ValueError when a prompt is longer than a tokenizer takes.
        """
        ids = {}
        cleaned = [self.clean(prompt) for prompt in prompts]
        for name, tokenizer in self.tokenizers.items():
            longest = self.length(tokenizer)
            for prompt in cleaned:
                length = len(tokenizer(prompt).input_ids)
                if length > longest:
                    raise ValueError(
                        f"the prompt {prompt!r} has {length} tokens; {self._model.source!r} takes {longest}"
                    )
            padded = tokenizer(cleaned, padding="max_length", max_length=longest, return_tensors="pt")
            ids[name] = padded.input_ids
        return ids

    @abstractmethod
    def encode(self, encoders: Mapping[str, nn.Module], ids: TokenIds) -> Conditioning:
        """The conditioning of a batch of tokenized prompts; gradients flow into the encoders."""
