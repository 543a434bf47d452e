"""Learned embeddings: an identifier's token embeddings, a few KB that diffusers' `load_textual_inversion` reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreambooth.backbones import Backbone
from dreambooth.methods.textual_inversion import LEARNED_EMBEDS, LearnedEmbeds, read_learned_embeds
from dreambooth.versions.base import TOKEN_EMBEDDINGS, Content, Files, State, VersionForm


class LearnedEmbeddings(VersionForm):
    """One component, `learned_embeds`, with a file for each text encoder."""

    name = "learned-embeds"

    def components(self, family: type[Backbone]) -> set[str]:
        """The embeddings alone."""
        return {LEARNED_EMBEDS}

    def build(
        self, backbone: Backbone, state: State, *, trained: Sequence[str], identifier: str, dtype: torch.dtype
    ) -> Content:
        """The embeddings `embeds.TEXT_ENCODER` of the state, and the backbone's text encoders with them."""
        embeds = LearnedEmbeds(backbone, identifier, {name: state[f"embeds.{name}"] for name in backbone.text_encoders})
        encoders = {name: backbone.load(name, dtype) for name in backbone.text_encoders}
        embeds.write_into(encoders)
        return Content({LEARNED_EMBEDS: embeds}, encoders)

    @torch.no_grad()
    def load(
        self, folder: Path, backbone: Backbone, components: Sequence[str], dtype: torch.dtype
    ) -> Mapping[str, Any]:
        """The backbone's text encoders with the folder's embeddings."""
        encoders: dict[str, Any] = {name: backbone.load(name, dtype) for name in backbone.text_encoders}
        for encoder, token_ids, rows in read_learned_embeds(folder / LEARNED_EMBEDS):
            weight = encoders[encoder].get_input_embeddings().weight
            weight[token_ids] = rows.to(weight)
        return encoders

    def most_bytes(self, components: Sequence[str], files: Files, base: Mapping[str, Tensor]) -> int:
        """Those of the files."""
        return sum(int(entry["size"]) for entry in files.values())

    def changes(
        self, folder: Path, components: Sequence[str], files: Files, base: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """A row `token_embeddings.TEXT_ENCODER[TOKEN]` for each token."""
        for encoder, token_ids, rows in read_learned_embeds(folder / LEARNED_EMBEDS):
            for token, row in zip(token_ids, rows, strict=True):
                yield f"{TOKEN_EMBEDDINGS}.{encoder}[{token}]", row
