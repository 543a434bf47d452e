"""Textual Inversion: embeddings of the identifier alone are trained, and diffusers reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from dreambooth.backbones import Backbone, open_backbone
from dreambooth.methods.textual_inversion import InvertedText, LearnedEmbeds, read_learned_embeds

IDENTIFIER = "zqx"


@pytest.fixture(params=["small_stable_diffusion", "small_sdxl", "small_if"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    folder: Path = request.getfixturevalue(request.param)
    return open_backbone(folder)


def load_encoders(backbone: Backbone) -> dict[str, Any]:
    return {name: backbone.load(name) for name in backbone.text_encoders}


def random_embeds(backbone: Backbone, encoders: dict[str, Any], identifier: str = IDENTIFIER) -> LearnedEmbeds:
    embeds = LearnedEmbeds.of_noun(backbone, encoders, identifier, "mug")
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in embeds.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return embeds


def encode(backbone: Backbone, encoders: dict[str, Any], prompt: str) -> dict[str, Tensor]:
    with torch.no_grad():
        return backbone.text.encode(encoders, backbone.text.tokenize([prompt]))


def test_it_begins_as_the_class_noun(backbone: Backbone) -> None:
    encoders = load_encoders(backbone)
    noun = "mug"
    embeds = LearnedEmbeds.of_noun(backbone, encoders, IDENTIFIER, noun)
    for name, tokenizer in zip(backbone.text_encoders, backbone.text.tokenizers.values(), strict=True):
        table = encoders[name].get_input_embeddings().weight
        mean = table[tokenizer.encode(noun, add_special_tokens=False)].mean(0)
        own = {token for token in tokenizer.encode(IDENTIFIER, add_special_tokens=False) if tokenizer.decode([token])}
        assert torch.equal(getattr(embeds, name), mean.expand(len(own), -1))


def test_prompts_with_the_identifier_alone_change(backbone: Backbone) -> None:
    encoders = load_encoders(backbone)
    embeds = random_embeds(backbone, encoders)
    plain, named = encode(backbone, encoders, "a mug"), encode(backbone, encoders, f"a {IDENTIFIER}")
    with embeds.looked_up(embeds(), encoders):
        looked_up = encode(backbone, encoders, f"a {IDENTIFIER}")
        assert all(torch.equal(plain[name], value) for name, value in encode(backbone, encoders, "a mug").items())
    assert not any(torch.equal(named[name], value) for name, value in looked_up.items())
    assert all(torch.equal(named[name], value) for name, value in encode(backbone, encoders, f"a {IDENTIFIER}").items())
    embeds.write_into(encoders)
    assert all(
        torch.equal(looked_up[name], value) for name, value in encode(backbone, encoders, f"a {IDENTIFIER}").items()
    )


def test_gradients_reach_the_embeddings_and_nothing_else(backbone: Backbone) -> None:
    networks = {name: backbone.load(name) for name in (backbone.denoiser, *backbone.text_encoders)}
    module = InvertedText(backbone, networks, IDENTIFIER, "mug")
    assert {name for name, _ in module.named_parameters()} == {f"embeds.{name}" for name in backbone.text_encoders}
    sizes = {name: value[None] for name, value in backbone.size_conditioning((32, 32), (0, 0), (32, 32)).items()}
    z_t = torch.randn(1, *backbone.latents.shape(32))
    module(z_t, torch.tensor([500]), sizes, backbone.text.tokenize([f"a {IDENTIFIER}"])).square().mean().backward()
    assert all((p.grad is not None and p.grad.abs().min() > 0) for p in module.parameters())
    assert all(p.grad is None for network in networks.values() for p in network.parameters())


@pytest.mark.parametrize("identifier", [IDENTIFIER, "zzzzzz"])
@pytest.mark.parametrize("family", ["small_stable_diffusion", "small_sdxl"])
def test_diffusers_reads_them_and_draws_the_same_image(
    request: pytest.FixtureRequest, tmp_path: Path, family: str, identifier: str
) -> None:
    backbone = open_backbone(request.getfixturevalue(family))
    encoders = load_encoders(backbone)
    embeds = random_embeds(backbone, encoders, identifier)
    embeds.save_pretrained(tmp_path)
    embeds.write_into(encoders)
    ours, plain = backbone.pipeline(torch.float32, encoders), backbone.pipeline(torch.float32)

    def draw(pipeline: Any, prompt: str) -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipeline(prompt, num_inference_steps=3, generator=generator, output_type="np").images

    before = draw(plain, f"a {identifier} on the beach")
    for encoder, tokenizer in zip(backbone.text_encoders, backbone.text.tokenizer_names, strict=True):
        plain.load_textual_inversion(
            str(tmp_path),
            weight_name=f"{encoder}.safetensors",
            token="<mine>",
            text_encoder=getattr(plain, encoder),
            tokenizer=getattr(plain, tokenizer),
        )
    image = draw(ours, f"a {identifier} on the beach")
    assert abs(image - draw(plain, "a <mine> on the beach")).max() < 1e-5
    assert abs(image - before).max() > 1e-3


def test_what_is_saved_is_small_and_names_its_tokens(backbone: Backbone, tmp_path: Path) -> None:
    embeds = random_embeds(backbone, load_encoders(backbone), "zzzzzz")
    embeds.save_pretrained(tmp_path)
    found = {encoder: (ids, rows) for encoder, ids, rows in read_learned_embeds(tmp_path)}
    assert found.keys() == set(backbone.text_encoders)
    for encoder, (ids, rows) in found.items():
        assert ids == embeds.token_ids[encoder]
        own = getattr(embeds, encoder)
        assert all(
            torch.equal(row, own[list(dict.fromkeys(ids)).index(token)]) for token, row in zip(ids, rows, strict=True)
        )
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 4096


def test_files_have_one_entry_of_metadata_whose_order_cannot_vary(backbone: Backbone, tmp_path: Path) -> None:
    embeds = random_embeds(backbone, load_encoders(backbone))
    embeds.save_pretrained(tmp_path)
    for path in tmp_path.iterdir():
        with safe_open(path, "pt") as file:
            assert len(file.metadata()) == 1  # of several, safetensors' order differs from process to process


def test_embeddings_of_another_identifier_are_refused(backbone: Backbone) -> None:
    embeds = {name: torch.zeros(9, 4) for name in backbone.text_encoders}
    with pytest.raises(ValueError, match="9 embeddings do not fit identifier 'zqx'"):
        LearnedEmbeds(backbone, IDENTIFIER, embeds)
