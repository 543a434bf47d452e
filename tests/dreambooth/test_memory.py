"""The memory plan against real networks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import Adafactor

from dreambooth.backbones import Backbone, open_backbone
from dreambooth.memory import MemoryPlan, enable_gradient_checkpointing, plan_memory

ROWS, RESOLUTION = 4, 32


@pytest.fixture(params=["small_stable_diffusion", "small_sdxl", "small_if"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    folder: Path = request.getfixturevalue(request.param)
    return open_backbone(folder)


def plan(backbone: Backbone, trained: Sequence[str] = ("unet",), **options: Any) -> MemoryPlan:
    defaults: dict[str, Any] = {
        "rows": ROWS,
        "resolution": RESOLUTION,
        "precision": "fp32",
        "zero_stage": 0,
        "workers": 1,
        "offload": "none",
        "gradient_checkpointing": False,
    }
    return plan_memory(backbone, trained=trained, **{**defaults, **options})


def all_trained(backbone: Backbone, with_text: bool) -> tuple[str, ...]:
    return ("unet", *backbone.text_encoders) if with_text else ("unet",)


def kept_by_autograd(backbone: Backbone, networks: dict[str, nn.Module]) -> int:
    """Bytes that a real forward pass on the CPU saves for the backward pass, beside the weights."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # being kept, no two live at one address
        return tensor

    encoders = {name: networks.get(name, backbone.load(name)) for name in backbone.text_encoders}
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.set_grad_enabled(len(networks) > 1):
            conditioning = backbone.text.encode(encoders, backbone.text.tokenize(["a dog"] * ROWS))
        size = (RESOLUTION, RESOLUTION)
        for name, value in backbone.size_conditioning(size, (0, 0), size).items():
            conditioning[name] = value.expand(ROWS, *value.shape)
        z_t = torch.randn(ROWS, *backbone.latents.shape(RESOLUTION), generator=torch.Generator().manual_seed(0))
        backbone.predict(networks["unet"], z_t, torch.arange(ROWS), conditioning)
    weights = {p.untyped_storage().data_ptr() for network in networks.values() for p in network.parameters()}
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in weights)


def test_textual_inversion_holds_frozen_networks_and_trains_a_few_rows(backbone: Backbone) -> None:
    networks = {name: backbone.load(name) for name in all_trained(backbone, with_text=True)}
    planned = plan(backbone, (), method="textual-inversion")
    assert planned.frozen == 4 * sum(p.numel() for network in networks.values() for p in network.parameters())
    widths = [networks[name].get_input_embeddings().embedding_dim for name in backbone.text_encoders]
    assert planned.parameters == 3 * sum(widths)
    for network in networks.values():
        network.requires_grad_(False)
    for name in backbone.text_encoders:
        networks[name].get_input_embeddings().weight.requires_grad_(True)
    assert planned.activations == pytest.approx(kept_by_autograd(backbone, networks), rel=0.02)


@pytest.mark.parametrize("with_text", [False, True])
def test_parameters_are_those_of_the_real_networks(backbone: Backbone, with_text: bool) -> None:
    trained = all_trained(backbone, with_text)
    count = sum(parameter.numel() for name in trained for parameter in backbone.load(name).parameters())
    assert plan(backbone, trained).parameters == count


@pytest.mark.parametrize(("with_text", "gradient_checkpointing"), [(False, False), (True, False), (True, True)])
def test_activations_are_what_a_real_pass_keeps(
    backbone: Backbone, with_text: bool, gradient_checkpointing: bool
) -> None:
    trained = all_trained(backbone, with_text)
    networks = {name: backbone.load(name) for name in trained}
    if gradient_checkpointing:
        for network in networks.values():
            enable_gradient_checkpointing(network)
    planned = plan(backbone, trained, gradient_checkpointing=gradient_checkpointing).activations
    assert planned == pytest.approx(kept_by_autograd(backbone, networks), rel=0.05)


def test_activations_grow_with_rows_resolution_and_trained_networks_and_halve_in_bf16(backbone: Backbone) -> None:
    base = plan(backbone).activations
    assert plan(backbone, rows=2 * ROWS).activations == pytest.approx(2 * base, rel=0.02)
    assert plan(backbone, resolution=2 * RESOLUTION).activations > 3 * base
    assert plan(backbone, all_trained(backbone, True)).activations > base
    assert plan(backbone, precision="bf16", zero_stage=1).activations == pytest.approx(base / 2, rel=0.1)


@pytest.mark.parametrize("with_text", [False, True])
def test_gradient_checkpointing_keeps_a_fraction(backbone: Backbone, with_text: bool) -> None:
    trained = all_trained(backbone, with_text)
    whole = plan(backbone, trained).activations
    # In the blocks of DeepFloyd IF diffusers recomputes the convolutions, not the attention.
    fraction = 0.7 if backbone.family.startswith("deepfloyd") else 0.3
    assert plan(backbone, trained, gradient_checkpointing=True).activations < fraction * whole


# Bytes a parameter, with 4 workers: weights, gradients, optimizer states.
STAGES = {
    ("fp32", 0): (4, 4, 8),
    ("fp32", 1): (4, 4, 12 / 4),
    ("fp32", 2): (4, 4 / 4, 12 / 4),
    ("fp32", 3): (4 / 4, 4 / 4, 12 / 4),
    ("bf16", 1): (2, 2, 12 / 4),
    ("bf16", 2): (2, 2 / 4, 12 / 4),
    ("bf16", 3): (2 / 4, 2 / 4, 12 / 4),
}


@pytest.mark.parametrize(("precision", "zero_stage"), STAGES)
def test_zero_divides_states_then_gradients_then_weights(backbone: Backbone, precision: str, zero_stage: int) -> None:
    memory = plan(backbone, precision=precision, zero_stage=zero_stage, workers=4)
    parts = (memory.weights, memory.gradients, memory.optimizer_states)
    assert parts == tuple(int(memory.parameters * each) for each in STAGES[precision, zero_stage])
    assert memory.offloaded == 0
    assert memory.total == sum(parts) + memory.activations


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(("zero_stage", "divisor"), [(1, 1), (2, 4), (3, 4)])
def test_accumulated_gradients_are_float32(backbone: Backbone, precision: str, zero_stage: int, divisor: int) -> None:
    memory = plan(backbone, precision=precision, zero_stage=zero_stage, workers=4, gradient_accumulation=2)
    assert memory.gradients == memory.parameters * 4 // divisor


def test_adafactors_state_is_what_it_really_keeps(backbone: Backbone) -> None:
    unet = backbone.load("unet")
    optimizer = Adafactor(unet.parameters(), lr=1e-3, relative_step=False, scale_parameter=False)
    for parameter in unet.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = [value for state in optimizer.state.values() for name, value in state.items() if "exp_avg" in name]
    assert plan(backbone, optimizer="adafactor").optimizer_states == sum(value.nbytes for value in kept)


def test_8_bit_moments_are_a_quarter_of_whole_ones_and_a_scale_for_each_block(backbone: Backbone) -> None:
    planned = plan(backbone, optimizer="adamw-8bit").optimizer_states
    small = sum(p.numel() for p in backbone.load("unet").parameters() if p.numel() < 4096)
    large = plan(backbone).parameters - small
    assert planned == pytest.approx(8 * small + 2 * large * (1 + 4 / 256), rel=1e-3)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_offloading_moves_to_the_host_and_loses_nothing(backbone: Backbone, zero_stage: int) -> None:
    here = plan(backbone, zero_stage=zero_stage, workers=2)
    there = plan(backbone, zero_stage=zero_stage, workers=2, offload="cpu")
    assert (there.gradients, there.optimizer_states) == (0, 0)
    assert there.weights == (0 if zero_stage == 3 else here.weights)
    assert there.activations == here.activations
    assert there.total + there.offloaded == here.total


@pytest.mark.parametrize(("precision", "each"), [("fp32", 4), ("bf16", 2)])
def test_a_teacher_lies_whole_on_every_device(backbone: Backbone, precision: str, each: int) -> None:
    options: dict[str, Any] = {"zero_stage": 3, "workers": 4, "offload": "cpu", "precision": precision}
    trained = all_trained(backbone, True)
    alone, taught = plan(backbone, trained, **options), plan(backbone, trained, teacher=True, **options)
    held = sum(parameter.numel() * each for parameter in backbone.load("unet").parameters())
    assert taught.total - alone.total == taught.frozen == held
    assert taught.offloaded == alone.offloaded


def test_planning_reads_no_weights(small_sdxl: Path, tmp_path: Path) -> None:
    for file in small_sdxl.rglob("*"):
        copy = tmp_path / file.relative_to(small_sdxl)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            copy.write_bytes(b"" if file.suffix == ".safetensors" else file.read_bytes())
    assert plan(open_backbone(tmp_path)) == plan(open_backbone(small_sdxl))


def test_attention_is_itself_again_after_planning(backbone: Backbone) -> None:
    before = nn.functional.scaled_dot_product_attention
    plan(backbone)
    with pytest.raises(KeyError, match="unet"):
        plan(backbone, ["text_encoder"])
    assert nn.functional.scaled_dot_product_attention is before
