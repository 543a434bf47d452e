"""Every form gives back what was trained: in memory, from its files, and as the changes that a server swaps in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dreambooth.backbones import Backbone, open_backbone
from dreambooth.methods import METHODS
from dreambooth.versions import FORMS, form_of
from dreambooth.versions.base import TOKEN_EMBEDDINGS

IDENTIFIER = "zqx"
TRAINED = {"components": ("unet", "text_encoder"), "learned-embeds": ()}


@pytest.fixture(params=["small_stable_diffusion", "small_sdxl"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return open_backbone(request.getfixturevalue(request.param))


def trained_state(backbone: Backbone, form: str) -> dict[str, Tensor]:
    """What a final checkpoint of a method with this form holds: the start with noise."""
    [method] = [method for method in METHODS.values() if method.form == form]
    networks = {name: backbone.load(name) for name in method.networks(backbone, TRAINED[form])}
    module = method.module(backbone, networks, identifier=IDENTIFIER, class_noun="mug")
    torch.manual_seed(0)
    return {name: (value + 0.02 * torch.randn_like(value)).detach() for name, value in module.named_parameters()}


def server_tensors(backbone: Backbone) -> dict[str, Tensor]:
    """The backbone's tensors by the names that a server gives them."""
    base: dict[str, Tensor] = {}
    for component in (backbone.denoiser, *backbone.text_encoders):
        network: Any = backbone.load(component)
        base |= {f"{component}.{name}": value for name, value in network.state_dict().items()}
        if component in backbone.text_encoders:
            base[f"{TOKEN_EMBEDDINGS}.{component}"] = network.get_input_embeddings().weight.detach()
    return base


def files_of(folder: Path) -> dict[str, dict[str, Any]]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): {"size": path.stat().st_size} for path in paths}


@pytest.mark.parametrize("name", FORMS)
def test_what_is_saved_is_loaded_and_swapped_in_as_trained(backbone: Backbone, name: str, tmp_path: Path) -> None:
    form, trained = FORMS[name], TRAINED[name]
    state = trained_state(backbone, name)
    content = form.build(backbone, state, trained=trained, identifier=IDENTIFIER, dtype=torch.float32)
    form.save(content, tmp_path, backbone.hash)
    components = sorted(content.parts)
    assert set(components) <= form.components(type(backbone))
    assert {path.name for path in tmp_path.iterdir()} == set(components)

    loaded = form.load(tmp_path, backbone, components, torch.float32)
    assert loaded.keys() == content.replacements.keys()
    for component, network in loaded.items():
        expected = content.replacements[component].state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in network.state_dict().items())
        base = backbone.load(component).state_dict()
        assert any(not torch.equal(value, base[key]) for key, value in network.state_dict().items())

    live, files, taken = server_tensors(backbone), files_of(tmp_path), 0
    for key, tensor in form.changes(tmp_path, components, files, server_tensors(backbone)):
        whole, _, row = key.partition("[")
        (live[whole][int(row[:-1])] if row else live[whole]).copy_(tensor)
        taken += tensor.nbytes
    for component, network in loaded.items():
        table = network.get_input_embeddings().weight if component in backbone.text_encoders else None
        for key, value in network.state_dict().items():
            swapped = live[f"{component}.{key}"]
            if table is not None and value.data_ptr() == table.data_ptr() and name == "learned-embeds":
                swapped = live[f"{TOKEN_EMBEDDINGS}.{component}"]
            assert torch.equal(swapped, value), f"{component}.{key}"
    assert taken <= form.most_bytes(components, files, server_tensors(backbone))


def test_versions_of_before_forms_had_names_are_known_by_their_components() -> None:
    assert form_of({"components": ["unet"]}).name == "components"
    assert form_of({"components": ["learned_embeds"]}).name == "learned-embeds"
    assert form_of({"components": ["unet"], "form": "learned-embeds"}).name == "learned-embeds"


def test_an_unknown_form_is_named() -> None:
    with pytest.raises(ValueError, match="its form is 'int3', and components, learned-embeds are known here"):
        form_of({"components": ["unet"], "form": "int3"})
