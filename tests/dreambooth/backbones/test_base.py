"""The backbone protocol against diffusers' own pipelines, for the families that draw images from text alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub.constants
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from torch import Tensor

from dreambooth.backbones import SDXL, Backbone, Conditioning, StableDiffusion, open_backbone

PROMPTS = ["a dog on the beach", "a cat"]


@pytest.fixture(params=["small_stable_diffusion", "small_sdxl", "small_if"])
def folder(request: pytest.FixtureRequest) -> Path:
    """The folder of a small backbone of each family; not to be written to."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def backbone(folder: Path) -> Backbone:
    return open_backbone(folder)


@pytest.fixture(params=["small_stable_diffusion", "small_sdxl"])
def latent_folder(request: pytest.FixtureRequest) -> Path:
    """The folder of a small backbone of each family that works on latents; not to be written to."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def latent_backbone(latent_folder: Path) -> Backbone:
    return open_backbone(latent_folder)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to be damaged."""
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture
def latent_copy(latent_folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to be damaged."""
    return shutil.copytree(latent_folder, tmp_path / "copy")


def edit_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def encode(backbone: Backbone, prompts: list[str]) -> Conditioning:
    with torch.no_grad():
        encoders = {name: backbone.load(name) for name in backbone.text_encoders}
        return backbone.text.encode(encoders, backbone.text.tokenize(prompts))


# -- the same as diffusers ---------------------------------------------------------------------------------------------


def test_families_are_known_by_their_pipeline(small_sdxl: Path, small_stable_diffusion: Path) -> None:
    assert isinstance(open_backbone(small_sdxl), SDXL)
    assert isinstance(open_backbone(str(small_stable_diffusion)), StableDiffusion)


def test_text_is_encoded_as_in_the_pipeline(backbone: Backbone) -> None:
    pipeline = backbone.pipeline(torch.float32)
    expected = pipeline.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    conditioning = encode(backbone, PROMPTS)
    torch.testing.assert_close(conditioning["encoder_hidden_states"], expected[0])
    if isinstance(backbone, SDXL):
        torch.testing.assert_close(conditioning["text_embeds"], expected[2])


def test_the_denoiser_says_what_it_says_in_the_pipeline(backbone: Backbone) -> None:
    seen: dict[str, Any] = {}

    def look(_: Any, arguments: tuple[Any, ...], named: dict[str, Any], output: tuple[Tensor]) -> None:
        seen.update(named, z_t=arguments[0], t=arguments[1], output=output[0])

    pipeline = backbone.pipeline(torch.float32)
    pipeline.unet.register_forward_hook(look, with_kwargs=True)
    sizes = ((50, 60), (3, 5), (32, 32))
    names = ("original_size", "crops_coords_top_left", "target_size") if isinstance(backbone, SDXL) else ()
    pipeline(
        PROMPTS,
        num_inference_steps=1,
        guidance_scale=1.0,
        height=32,
        width=32,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **dict(zip(names, sizes, strict=False)),
    )
    conditioning = encode(backbone, PROMPTS)
    for name, value in backbone.size_conditioning(*sizes).items():
        conditioning[name] = value.expand(len(PROMPTS), *value.shape)
    torch.testing.assert_close(conditioning["encoder_hidden_states"], seen["encoder_hidden_states"])
    added = seen.get("added_cond_kwargs") or {}
    assert bool(added) is (backbone.family == "sdxl")
    for name, value in added.items():
        torch.testing.assert_close(conditioning[name], value)
    with torch.no_grad():
        t = seen["t"].expand(len(PROMPTS))
        output = backbone.predict(backbone.load(backbone.denoiser), seen["z_t"], t, conditioning)
    torch.testing.assert_close(output, seen["output"][:, : output.shape[1]])
    assert output.shape == (2, *backbone.latents.shape(32))


def test_micro_conditioning_changes_what_sdxl_says(small_sdxl: Path) -> None:
    backbone = open_backbone(small_sdxl)
    text, unet = encode(backbone, ["a dog"]), backbone.load("unet")
    z_t = torch.ones(1, *backbone.latents.shape(32))

    def say(*crop: int) -> Tensor:
        sizes = backbone.size_conditioning((32, 64), (crop[0], crop[1]), (32, 32))
        with torch.no_grad():
            sizes = {name: value[None] for name, value in sizes.items()}
            return backbone.predict(unet, z_t, torch.tensor([500]), text | sizes)

    assert not torch.allclose(say(0, 0), say(0, 16), atol=1e-6)
    assert backbone.size_conditioning((1, 2), (3, 4), (5, 6))["time_ids"].tolist() == [1, 2, 3, 4, 5, 6]


def test_gradients_flow_into_the_text_encoders(backbone: Backbone) -> None:
    encoders = {name: backbone.load(name) for name in backbone.text_encoders}
    conditioning = backbone.text.encode(encoders, backbone.text.tokenize(PROMPTS))
    torch.stack([value.sum() for value in conditioning.values()]).sum().backward()
    for encoder in encoders.values():
        gradient = encoder.get_input_embeddings().weight.grad  # type: ignore[operator]
        assert gradient is not None
        assert gradient.abs().sum() > 0


# -- text --------------------------------------------------------------------------------------------------------------


def test_prompts_are_padded_to_the_tokenizers_length(backbone: Backbone) -> None:
    ids = backbone.text.tokenize(PROMPTS)
    assert {name: value.shape for name, value in ids.items()} == dict.fromkeys(backbone.text.tokenizer_names, (2, 77))


def test_a_prompt_that_is_too_long_is_named(backbone: Backbone) -> None:
    room = 77 - len(next(iter(backbone.text.tokenizers.values()))("").input_ids)
    backbone.text.tokenize(["a " * room])
    with pytest.raises(ValueError, match=r"the prompt 'a a .* has 78 tokens; .* takes 77"):
        backbone.text.tokenize(["a dog", "a " * (room + 1)])


# -- latents -----------------------------------------------------------------------------------------------------------


def test_images_are_encoded_to_the_mean_and_log_variance_of_their_latents(latent_backbone: Backbone) -> None:
    backbone = latent_backbone
    vae: Any = backbone.load("vae")
    pixels = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    mean, log_variance = backbone.latents.encode({"vae": vae}, pixels)
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    assert mean.shape == log_variance.shape == (2, *backbone.latents.shape(32))
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close((0.5 * log_variance).exp(), posterior.std)
    assert not mean.requires_grad
    assert backbone.latents.encode({"vae": vae.to(torch.bfloat16)}, pixels)[0].dtype == torch.float32


def test_latents_that_are_not_finite_are_an_error(latent_backbone: Backbone) -> None:
    with pytest.raises(ArithmeticError, match="gave latents that are not finite"):
        latent_backbone.latents.encode({"vae": latent_backbone.load("vae")}, torch.full((1, 3, 32, 32), torch.nan))


SCALES = {
    "factor": ({"scaling_factor": 0.5}, [1.0, 2.0, 3.0, 4.0]),
    "shift": ({"scaling_factor": 0.5, "shift_factor": 1.0}, [0.5, 1.5, 2.5, 3.5]),
    "mean and std": (
        {"scaling_factor": 0.5, "latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [1.0, 2.0, 0.5, 4.0]},
        [0.5, 0.5, 3.0, 0.5],
    ),
}


@pytest.mark.parametrize(("config", "scaled"), SCALES.values(), ids=SCALES)
def test_latents_are_scaled_as_the_autoencoders_configuration_says(
    latent_copy: Path, config: dict[str, Any], scaled: list[float]
) -> None:
    edit_json(latent_copy / "vae/config.json", lambda value: value.update(config))
    latents = torch.tensor([2.0, 4.0, 6.0, 8.0]).view(1, 4, 1, 1).expand(2, 4, 3, 3)
    result = open_backbone(latent_copy).latents.scale(latents)
    torch.testing.assert_close(result[1, :, 2, 0], torch.tensor(scaled))
    assert result.shape == latents.shape


def test_the_pipeline_decodes_scaled_latents_back_to_the_image(small_sdxl: Path, tmp_path: Path) -> None:
    """Our scaling is the inverse of the one in diffusers' SDXL pipeline, with latents_mean and latents_std, too."""
    copy = shutil.copytree(small_sdxl, tmp_path / "copy")
    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.5, 1.0, 2.0, 3.0]}
    edit_json(copy / "vae/config.json", lambda value: value.update(statistics))
    backbone = open_backbone(copy)
    pipeline = backbone.pipeline(torch.float32)
    seen: list[Tensor] = []
    decode = pipeline.vae.decode
    pipeline.vae.decode = lambda latents, **options: seen.append(latents) or decode(latents, **options)
    denoised = []
    pipeline(
        "a dog",
        num_inference_steps=1,
        height=32,
        width=32,
        callback_on_step_end=lambda _, __, ___, tensors: denoised.append(tensors["latents"]) or tensors,
    )
    torch.testing.assert_close(backbone.latents.scale(seen[0]), denoised[0])


# -- sizes -------------------------------------------------------------------------------------------------------------


def test_sizes_come_from_the_configurations(latent_backbone: Backbone) -> None:
    backbone = latent_backbone
    assert (backbone.latents.pixels_per_latent, backbone.default_resolution) == (4, 32)
    assert backbone.latents.shape(64) == (4, 16, 16)
    backbone.latents.check_side(40)


@pytest.mark.parametrize("resolution", [0, -32, 4, 36, 33])
def test_a_resolution_that_does_not_fit_is_named(latent_backbone: Backbone, resolution: int) -> None:
    with pytest.raises(ValueError, match=f"resolution of {resolution} does not fit this backbone: use a multiple of 8"):
        latent_backbone.latents.check_side(resolution)


# -- the hash ----------------------------------------------------------------------------------------------------------


def test_the_hash_is_that_of_the_files_wherever_they_are(backbone: Backbone, copy: Path) -> None:
    (copy / "README.md").write_text("of no matter")
    (copy / "unet/diffusion_pytorch_model.bin").write_bytes(b"an old pickle beside the weights")
    (copy / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"a smaller form of the same weights")
    assert open_backbone(copy).hash == backbone.hash
    assert len(backbone.hash) == 64


@pytest.mark.parametrize(
    "name",
    ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "scheduler/scheduler_config.json"],
)
def test_the_hash_changes_with_one_byte(backbone: Backbone, copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    position = data.index(b'"beta_end": 0.0') + 14 if name.endswith("json") else len(data) - 1
    data[position] ^= 1
    (copy / name).write_bytes(data)
    assert open_backbone(copy).hash != backbone.hash


def test_the_files_are_enough_to_load_the_backbone(backbone: Backbone, tmp_path: Path) -> None:
    for name in backbone.files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(backbone.folder / name, tmp_path / name)
    assert open_backbone(tmp_path).hash == backbone.hash
    pipeline = getattr(diffusers, backbone.pipeline_classes[0]).from_pretrained(tmp_path)
    assert pipeline.tokenizer("a dog").input_ids == backbone.text.tokenizers["tokenizer"]("a dog").input_ids


def test_a_backbone_that_is_there_in_half_precision_only_is_loaded_from_that(folder: Path, tmp_path: Path) -> None:
    whole = open_backbone(folder)
    whole.pipeline(torch.float16).save_pretrained(tmp_path, variant="fp16")
    half = open_backbone(tmp_path)
    assert (whole.variant, half.variant) == (None, "fp16")
    for name in ("unet", *half.image_encoders, *half.text_encoders):
        for a, b in zip(whole.load(name).parameters(), half.load(name).parameters(), strict=True):
            assert b.dtype == torch.float32
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    assert half.pipeline(torch.bfloat16).unet.dtype == torch.bfloat16


# -- the schedule ------------------------------------------------------------------------------------------------------

STABLE_DIFFUSION: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize(
    "scheduler",
    [
        EulerDiscreteScheduler(**STABLE_DIFFUSION, timestep_spacing="leading"),
        DDIMScheduler(**STABLE_DIFFUSION, set_alpha_to_one=False, prediction_type="v_prediction"),
        DDIMScheduler(**STABLE_DIFFUSION, rescale_betas_zero_snr=True, prediction_type="v_prediction"),
        PNDMScheduler(skip_prk_steps=True),
        LCMScheduler(),
    ],
    ids=["euler", "ddim", "ddim zero snr", "pndm", "lcm"],
)
def test_the_schedule_is_that_of_the_backbones_scheduler(copy: Path, scheduler: Any) -> None:
    scheduler.save_pretrained(copy / "scheduler")
    schedule = open_backbone(copy).objective
    assert schedule.steps == 1000
    assert schedule.prediction == scheduler.config.prediction_type
    torch.testing.assert_close(schedule.alphas_cumprod, scheduler.alphas_cumprod, atol=0, rtol=0)


def test_zero_terminal_snr_reaches_pure_noise(copy: Path) -> None:
    # Euler keeps 2**-24 in the last place, for a finite sigma; training has no need of that.
    scheduler = EulerDiscreteScheduler(**STABLE_DIFFUSION, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    scheduler.save_pretrained(copy / "scheduler")
    schedule = open_backbone(copy).objective
    torch.testing.assert_close(schedule.alphas_cumprod[:-1], scheduler.alphas_cumprod[:-1])
    assert schedule.alphas_cumprod[-1] == 0
    x, epsilon = torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
    assert schedule.add_noise(x, epsilon, torch.tensor([999])).abs().max() == 0


@pytest.mark.parametrize("scheduler", [EDMEulerScheduler(), FlowMatchEulerDiscreteScheduler()])
def test_a_scheduler_without_such_a_schedule_is_refused(copy: Path, scheduler: Any) -> None:
    for file in (copy / "scheduler").iterdir():
        file.unlink()
    scheduler.save_pretrained(copy / "scheduler")
    with pytest.raises(ValueError, match=f"not trainable here: {type(scheduler).__name__} fits no objective"):
        open_backbone(copy)


# -- what cannot be used -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_pickled_weights_are_refused(copy: Path, component: str) -> None:
    [weights] = (copy / component).glob("*.safetensors")
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match=rf"holds {component} only as a pickle \({weights.stem}\.bin\)") as error:
        open_backbone(copy)
    assert str(copy) in str(error.value)
    assert "safe_serialization=True" in str(error.value)


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_missing_weights_are_named(copy: Path, component: str) -> None:
    shutil.rmtree(copy / component)
    with pytest.raises(ValueError, match=rf"is incomplete: no {component}/\*\.safetensors in {copy}"):
        open_backbone(copy)


@pytest.mark.parametrize("component", ["unet", "tokenizer"])
def test_a_component_that_the_index_does_not_name_is_named(copy: Path, component: str) -> None:
    edit_json(copy / "model_index.json", lambda index: index.pop(component))
    with pytest.raises(ValueError, match=f"is incomplete: its model_index.json names no {component}"):
        open_backbone(copy)


def test_a_missing_scheduler_is_named(copy: Path) -> None:
    shutil.rmtree(copy / "scheduler")
    with pytest.raises(ValueError, match=f"is incomplete: no scheduler in {copy}"):
        open_backbone(copy)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}"])
def test_a_folder_without_a_readable_index_is_named(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(ValueError, match=rf"backbone '{tmp_path}' has no readable model_index\.json"):
        open_backbone(tmp_path)


def test_an_unknown_family_is_named_with_the_nearest(copy: Path) -> None:
    edit_json(copy / "model_index.json", lambda index: index.update(_class_name="StableDiffusionXXLPipeline"))
    with pytest.raises(ValueError, match="is a 'StableDiffusionXXLPipeline', a family that is not supported") as error:
        open_backbone(copy)
    assert "nearest is 'StableDiffusionXLPipeline'" in str(error.value)


def test_a_file_is_told_how_to_become_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.safetensors' is a file: give the folder .*from_single_file"):
        open_backbone(tmp_path / "model.safetensors")


@pytest.mark.parametrize("source", ["/no/such/folder", "./no-such", "no-such", "a/b/c"])
def test_a_missing_folder_is_named(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"backbone '{source}' is missing: no such folder, and it is not a hub id"):
        open_backbone(source)


def test_a_hub_id_that_cannot_be_had_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="backbone 'no-one/no-model' is missing: there is no such folder, and the hub"):
        open_backbone("no-one/no-model")


def test_a_component_of_a_foreign_library_is_refused(copy: Path) -> None:
    edit_json(copy / "model_index.json", lambda index: index.update(unet=["my_module", "MyUNet"]))
    with pytest.raises(ValueError, match="unet comes from 'my_module'"):
        open_backbone(copy).load("unet")
