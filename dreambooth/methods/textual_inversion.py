"""Textual Inversion, with which the paper compares: only the embeddings of the identifier's tokens are trained.

Gal et al., "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion", ICLR 2023. All
networks stay as they are. The identifier stands alone in prompts, "a [V]", and begins as the class noun. A version is a
few rows of each text encoder's token embeddings, in the form that diffusers' `load_textual_inversion` reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dreambooth.backbones import Backbone, Conditioning, TokenIds
from dreambooth.backbones.precision import in_precision
from dreambooth.backbones.presets import MachinePreset
from dreambooth.methods.base import BaseWeights, Defaults, Holdings, Method, Weights, parameter_group
from dreambooth.subjects.identifier import MAX_TOKENS

LEARNED_EMBEDS = "learned_embeds"
"""Name of a version's component, and of its folder."""


class LearnedEmbeds(nn.Module):
    """Token embeddings of an identifier: a parameter (k, width) for each text encoder, by its name.

    A row belongs to one of the identifier's k distinct tokens, in the order in which they first stand in it.
    """

    def __init__(self, backbone: Backbone, identifier: str, embeds: Mapping[str, Tensor]) -> None:
        """Hold `embeds` (k, width) by text encoder; raises ValueError when they do not fit the identifier's tokens."""
        super().__init__()
        self.identifier = identifier
        self.token_ids = _token_ids(backbone, identifier)
        for encoder, rows in embeds.items():
            if len(rows) != len(_distinct(self.token_ids[encoder])):
                raise ValueError(f"{len(rows)} embeddings do not fit identifier {identifier!r} in {encoder}")
            self.register_parameter(encoder, nn.Parameter(rows.detach().clone().float()))

    @classmethod
    def of_noun(
        cls, backbone: Backbone, encoders: Mapping[str, Any], identifier: str, class_noun: str
    ) -> LearnedEmbeds:
        """The start: every token of the identifier is the mean of the class noun's tokens."""
        tables = {name: encoder.get_input_embeddings().weight for name, encoder in encoders.items()}
        rows = {name: noun_rows(backbone, identifier, class_noun, name, table) for name, table in tables.items()}
        return cls(backbone, identifier, rows)

    def forward(self) -> dict[str, Tensor]:
        """The rows (k, width) by text encoder. A call: under ZeRO stage 3 weights are whole in calls alone."""
        return {name: parameter.clone() for name, parameter in self.named_parameters()}

    @contextmanager
    def looked_up(self, rows: Mapping[str, Tensor], encoders: Mapping[str, Any]) -> Iterator[None]:
        """While the block runs, the encoders find `rows` for the identifier's tokens, and gradients flow into them."""
        hooks = []
        for name, encoder in encoders.items():
            by_token = dict(zip(_distinct(self.token_ids[name]), rows[name], strict=True))

            def look_up(_: Any, inputs: tuple[Tensor], output: Tensor, by_token: Any = by_token) -> Tensor:
                for token, row in by_token.items():
                    output = torch.where((inputs[0] == token)[..., None], row.to(output.dtype), output)
                return output

            hooks += [table.register_forward_hook(look_up) for table in _tables(encoder)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def write_into(self, encoders: Mapping[str, Any]) -> None:
        """Overwrite the embeddings of the identifier's tokens in the text encoders."""
        for name, rows in self().items():
            weight = encoders[name].get_input_embeddings().weight
            weight[_distinct(self.token_ids[name])] = rows.to(weight)

    def save_pretrained(self, folder: Path) -> None:
        """Write `TEXT_ENCODER.safetensors` for each, which hold the identifier's n embeddings (n, width) by its text.

        Their metadata hold the token ids whose rows they take the place of.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in self().items():
            ids = self.token_ids[name]
            embeds = torch.stack([rows[_distinct(ids).index(token)] for token in ids])
            # One entry alone: safetensors writes several in an order of chance, and files are known by their bytes.
            metadata = {"token_ids": json.dumps(ids)}
            save_file({self.identifier: embeds.detach().cpu()}, folder / f"{name}.safetensors", metadata)


def read_learned_embeds(folder: Path) -> Iterator[tuple[str, list[int], Tensor]]:
    """For each text encoder of a saved folder: its name, the token ids, and their embeddings (n, width)."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            [identifier] = file.keys()
            yield path.stem, json.loads(file.metadata()["token_ids"]), file.get_tensor(identifier)


def noun_rows(backbone: Backbone, identifier: str, class_noun: str, encoder: str, table: Tensor) -> Tensor:
    """Rows (k, width) for the identifier's k tokens: the mean of the class noun's rows of `table` (tokens, width)."""
    mean = table[_token_ids(backbone, class_noun)[encoder]].mean(0, keepdim=True)
    return mean.expand(len(_distinct(_token_ids(backbone, identifier)[encoder])), -1)


class InvertedText(nn.Module):
    """What is trained, an identifier's embeddings, with the frozen networks through which it is seen.

    The frozen networks are no sub-modules: an engine around this one neither shards nor optimizes them.
    """

    def __init__(self, backbone: Backbone, frozen: Mapping[str, nn.Module], identifier: str, class_noun: str) -> None:
        """Freeze the denoiser and the text encoders `frozen`, by component name; begin as the class noun."""
        super().__init__()
        encoders = {name: frozen[name] for name in backbone.text_encoders}
        self.embeds = LearnedEmbeds.of_noun(backbone, encoders, identifier, class_noun)
        self.backbone, self.identifier, self.class_noun = backbone, identifier, class_noun
        self.frozen: dict[str, Any] = {name: network.requires_grad_(False) for name, network in frozen.items()}

    def forward(self, z_t: Tensor, t: Tensor, conditioning: Conditioning, ids: TokenIds) -> Tensor:
        """The frozen denoiser's prediction for prompts of token ids (B, length)."""
        encoders = {name: self.frozen[name] for name in self.backbone.text_encoders}
        with self.embeds.looked_up(self.embeds(), encoders):
            conditioning = conditioning | self.backbone.text.encode(encoders, ids)
        conditioning = in_precision(conditioning, z_t.dtype)
        return self.backbone.predict(self.frozen[self.backbone.denoiser], z_t, t, conditioning)


class TextualInversion(Method):
    """All networks stay as they are; the embeddings of the identifier's tokens are trained in each text encoder."""

    name = "textual-inversion"
    form = "learned-embeds"
    preserves_prior = False
    bare_identifier = True

    def check(self, *, train_text_encoder: bool, super_resolution: bool) -> None:
        """Refuse what would train networks."""
        given = {"--train-text-encoder": train_text_encoder, "--super-resolution": super_resolution}
        if asked := [name for name, value in given.items() if value]:
            raise ValueError(
                f"--method textual-inversion trains nothing but the identifier's embeddings: leave out {asked[0]}"
            )

    def defaults(self, backbone: Backbone, machine: MachinePreset | None, *, with_text: bool) -> Defaults:
        """The preset's own numbers for this method."""
        return Defaults(backbone.preset.inversion_steps, backbone.preset.inversion_learning_rate)

    def label(self, training: Mapping[str, Any]) -> str:
        """The name of Gal et al."""
        return f"Textual Inversion, {training['steps']} steps"

    def trained(self, backbone: Backbone, *, with_text: bool) -> tuple[str, ...]:
        """None."""
        return ()

    def networks(self, backbone: Backbone, trained: Sequence[str]) -> tuple[str, ...]:
        """The denoiser and the text encoders."""
        return (backbone.denoiser, *backbone.text_encoders)

    def trains_text(self, backbone: Backbone, trained: Sequence[str]) -> bool:
        """Always."""
        return True

    def module(
        self,
        backbone: Backbone,
        networks: Mapping[str, nn.Module],
        *,
        identifier: str,
        class_noun: str,
        settings: Any = None,
    ) -> nn.Module:
        """The identifier's embeddings, `embeds.TEXT_ENCODER`."""
        return InvertedText(backbone, networks, identifier, class_noun)

    def start(self, module: nn.Module, base: BaseWeights) -> Weights:
        """Every token of the identifier as the mean of the class noun's tokens."""
        assert isinstance(module, InvertedText)

        def value(name: str) -> Tensor:
            encoder = name.removeprefix("embeds.")
            table = module.frozen[encoder].get_input_embeddings().weight
            [found] = [key for key, one in module.frozen[encoder].named_parameters() if one is table]
            table = base[f"{encoder}.{found}"]
            return noun_rows(module.backbone, module.identifier, module.class_noun, encoder, table)

        return value

    def frozen(self, module: nn.Module) -> Mapping[str, nn.Module]:
        """All networks."""
        assert isinstance(module, InvertedText)
        return module.frozen

    def parameter_groups(
        self, backbone: Backbone, module: nn.Module, learning_rate: float, text_encoder_learning_rate: float
    ) -> list[dict[str, Any]]:
        """The embeddings, at one rate."""
        return [parameter_group(list(module.parameters()), learning_rate)]

    def holdings(self, backbone: Backbone, networks: Mapping[str, Any]) -> Holdings:
        """The longest identifier's rows of each text encoder; gradients flow as far as the token embeddings."""
        count = sum(parameter.numel() for network in networks.values() for parameter in network.parameters())
        for network in networks.values():
            network.requires_grad_(False)
        tables = [networks[name].get_input_embeddings().requires_grad_(True) for name in backbone.text_encoders]
        return Holdings([torch.Size([MAX_TOKENS, table.embedding_dim]) for table in tables], frozen=count)


def _token_ids(backbone: Backbone, text: str) -> dict[str, list[int]]:
    """The token ids of a word or words by text encoder, without those of mere space, which T5 may set before a word."""
    found = {}
    for encoder, tokenizer in zip(backbone.text_encoders, backbone.text.tokenizers.values(), strict=True):
        ids = tokenizer.encode(text, add_special_tokens=False)
        found[encoder] = [token for token in ids if tokenizer.decode([token]).strip()]
    return found


def _tables(encoder: Any) -> list[nn.Module]:
    """The modules that look token embeddings up; T5 has two of one weight."""
    weight = encoder.get_input_embeddings().weight
    return [module for module in encoder.modules() if isinstance(module, nn.Embedding) and module.weight is weight]


def _distinct(ids: Sequence[int]) -> list[int]:
    return list(dict.fromkeys(ids))
