"""DeepFloyd IF against diffusers' own pipelines: text, epsilon beside a variance, and what super-resolution is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, IFImg2ImgSuperResolutionPipeline, IFPipeline, IFSuperResolutionPipeline
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from dreambooth.backbones import DeepFloydIF, DeepFloydIFSuperResolution, LowResolution, open_backbone
from dreambooth.common.streams import normal
from dreambooth.memory import plan_memory
from dreambooth.sampling.sampler import SamplerSettings, load_pipeline, sample, to_pixels
from dreambooth.subjects.identifier import check_identifier, find_identifier

CPU = torch.device("cpu")
LOW = LowResolution(side=32, noise_level=120)
SETTINGS = SamplerSettings(resolution=32, steps=3, guidance=5.0, batch=1, threads=1, precision="fp32")


@pytest.fixture(scope="module")
def stage_i(small_if: Path) -> DeepFloydIF:
    backbone = open_backbone(small_if)
    assert isinstance(backbone, DeepFloydIF)
    return backbone


@pytest.fixture(scope="module")
def stage_ii(small_if_super_resolution: Path) -> DeepFloydIFSuperResolution:
    backbone = open_backbone(small_if_super_resolution)
    assert isinstance(backbone, DeepFloydIFSuperResolution)
    return backbone


@pytest.fixture(scope="module")
def photo() -> Tensor:
    """A smooth image with some texture, (1, 3, 64, 64) in [-1, 1]."""
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    image = torch.stack([rows, columns, torch.sin(20 * rows * columns)])[None]
    return (image + 0.1 * normal(image.shape, "texture")).clamp(-1, 1)


# -- stage I -----------------------------------------------------------------------------------------------------------


def test_pixels_are_their_own_latents(stage_i: DeepFloydIF) -> None:
    pixels = normal((2, 3, 32, 32), "pixels")
    mean, log_variance = stage_i.latents.encode({}, pixels)
    drawn = mean + (0.5 * log_variance).exp() * normal(mean.shape, "latent")
    assert torch.equal(stage_i.latents.scale(drawn), pixels)
    assert (stage_i.default_resolution, stage_i.latents.shape(64)) == (32, (3, 64, 64))
    stage_i.latents.check_side(34)
    with pytest.raises(ValueError, match="a resolution of 33 does not fit this backbone: use a multiple of 2"):
        stage_i.latents.check_side(33)


def test_padding_leaves_no_trace_in_the_text(stage_i: DeepFloydIF) -> None:
    """T5 hears the mask: what stands in the place of padding does not matter to the prompt's own states."""
    encoders = {"text_encoder": stage_i.load("text_encoder")}
    ids = stage_i.text.tokenize(["a dog"])["tokenizer"]
    length = int((ids != 0).sum())
    with torch.no_grad():
        padded = stage_i.text.encode(encoders, {"tokenizer": ids})["encoder_hidden_states"]
        alone = stage_i.text.encode(encoders, {"tokenizer": ids[:, :length]})["encoder_hidden_states"]
        unmasked = encoders["text_encoder"](ids).last_hidden_state
    torch.testing.assert_close(padded[:, :length], alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(padded, unmasked, atol=1e-3)


def test_prompts_are_cleaned_as_in_the_pipeline(stage_i: DeepFloydIF) -> None:
    pipeline = IFPipeline.from_pretrained(stage_i.folder)
    prompts = ["  A Dog on the BEACH ", 'a "dog", please', "a dog at http://example.com"]
    expected = pipeline._text_preprocessing(prompts, clean_caption=True)
    assert [stage_i.text.clean(prompt) for prompt in prompts] == expected
    assert torch.equal(*(stage_i.text.tokenize([text])["tokenizer"] for text in ("A Dog", "a dog")))


def test_an_identifier_that_cleaning_would_lose_is_refused_and_never_found(stage_i: DeepFloydIF) -> None:
    tokenizers = tuple(stage_i.text.tokenizers.values())
    with pytest.raises(ValueError, match="'Xqj' is lost to this backbone, which cleans prompts: it reads 'a Xqj dog'"):
        check_identifier("Xqj", tokenizers, stage_i.text.clean)
    found = {
        find_identifier(tokenizers, seed=seed, subject="dog", tokens=2, clean=stage_i.text.clean).text
        for seed in range(5)
    }
    assert all(stage_i.text.clean(f"a {text} dog") == f"a {text} dog" for text in found)


def test_only_epsilon_is_trained(stage_i: DeepFloydIF) -> None:
    unet: Any = stage_i.load("unet")
    z_t, t = normal((2, 3, 32, 32), "z"), torch.tensor([3, 700])
    conditioning = {"encoder_hidden_states": normal((2, 77, 24), "text")}
    said = stage_i.predict(unet, z_t, t, conditioning)
    assert said.shape == z_t.shape
    said.square().mean().backward()
    assert (unet.conv_out.weight.grad[:3] != 0).any()
    assert (unet.conv_out.weight.grad[3:] == 0).all()


def test_a_trained_unet_is_sampled_with_a_fixed_variance(stage_i: DeepFloydIF) -> None:
    parts = stage_i.trained_parts()
    before = DDPMScheduler.load_config(stage_i.folder, subfolder="scheduler")
    after = dict(parts["scheduler"].config)
    assert before["variance_type"] == "learned_range"
    assert after["variance_type"] == "fixed_small"
    assert {name: after[name] for name in before if name not in ("variance_type", "_class_name")} == {
        name: value for name, value in before.items() if name not in ("variance_type", "_class_name")
    }
    unet: Any = stage_i.load("unet")
    with torch.no_grad():
        unet.conv_out.bias[3:] = torch.nan  # the variance is no longer anyone's to read
    [image] = sample(load_pipeline(stage_i, SETTINGS, CPU, parts | {"unet": unet}), ["a dog"], [3], SETTINGS)
    plain = IFPipeline.from_pretrained(stage_i.folder, unet=unet, **parts)
    expected = plain("a dog", num_inference_steps=3, guidance_scale=5.0, generator=torch.Generator().manual_seed(3))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected.images[0]))


# -- stage II ----------------------------------------------------------------------------------------------------------


def test_the_default_noise_level_is_the_nearest_to_the_papers(stage_ii: DeepFloydIFSuperResolution) -> None:
    variances = 1 - DDPMScheduler.from_pretrained(stage_ii.folder, subfolder="image_noising_scheduler").alphas_cumprod
    distances = (variances - 1e-5).abs()
    assert distances[stage_ii.default_noise_level] == distances.min()


def fed(pipeline: Any, **call: Any) -> dict[str, Any]:
    """What enters the U-Net of a real pipeline at its first step."""
    seen: dict[str, Any] = {}

    def look(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not seen:
            seen.update(named, input=arguments[0], t=arguments[1])

    handle = pipeline.unet.register_forward_pre_hook(look, with_kwargs=True)
    pipeline(prompt=["a dog"], generator=torch.Generator().manual_seed(0), guidance_scale=1.0, output_type="pt", **call)
    handle.remove()
    return seen


def in_training(backbone: DeepFloydIFSuperResolution, x: Tensor, epsilon: Tensor, t: Tensor, noise: Tensor) -> Any:
    """What enters the U-Net when training predicts epsilon of the image x, by the same calls as training's."""
    encoders = {"text_encoder": backbone.load("text_encoder")}
    with torch.no_grad():
        conditioning = backbone.text.encode(encoders, backbone.text.tokenize(["a dog"]))
        conditioning |= backbone.image_conditioning(x, noise, LOW)
        seen: dict[str, Any] = {}
        unet = backbone.load("unet")
        unet.register_forward_pre_hook(
            lambda _, arguments, named: seen.update(named, input=arguments[0], t=arguments[1]), with_kwargs=True
        )
        backbone.predict(unet, backbone.objective.add_noise(x, epsilon, t), t, conditioning)
    return seen


def small_form(x: Tensor) -> Tensor:
    return interpolate(x, (32, 32), mode="bicubic", antialias=True).clamp(-1, 1)


def test_training_feeds_the_unet_what_the_super_resolution_pipeline_feeds_it(
    stage_ii: DeepFloydIFSuperResolution, photo: Tensor
) -> None:
    """The pipeline starts at t = T - 1 from pure noise, which z_t is there but for alpha_t x, of size 5e-5."""
    pipeline = IFSuperResolutionPipeline.from_pretrained(stage_ii.folder)
    theirs = fed(pipeline, image=small_form(photo), noise_level=LOW.noise_level, timesteps=[999, 500])
    generator = torch.Generator().manual_seed(0)  # as the pipeline draws: the start first, the augmentation after it
    epsilon, noise = (torch.randn(photo.shape, generator=generator) for _ in range(2))
    ours = in_training(stage_ii, photo, epsilon, torch.tensor([999]), noise)
    assert ours["input"].shape == theirs["input"].shape == (1, 6, 64, 64)
    torch.testing.assert_close(ours["input"][:, :3], theirs["input"][:, :3], atol=2e-4, rtol=0)
    torch.testing.assert_close(ours["input"][:, 3:], theirs["input"][:, 3:], atol=0, rtol=0)
    assert int(theirs["t"]) == int(ours["t"]) == 999
    assert theirs["class_labels"].tolist() == ours["class_labels"].tolist() == [LOW.noise_level]
    torch.testing.assert_close(ours["encoder_hidden_states"], theirs["encoder_hidden_states"])


def test_training_feeds_the_unet_what_the_pipeline_that_starts_from_an_image_feeds_it(
    stage_ii: DeepFloydIFSuperResolution, photo: Tensor
) -> None:
    """diffusers' image-to-image form noises a given image at a time in the middle, as training does."""
    parts = IFSuperResolutionPipeline.from_pretrained(stage_ii.folder).components
    pipeline = IFImg2ImgSuperResolutionPipeline(**parts, requires_safety_checker=False)
    theirs = fed(
        pipeline,
        image=small_form(photo),
        original_image=photo,
        noise_level=LOW.noise_level,
        strength=1.0,
        timesteps=[400, 200],
    )
    generator = torch.Generator().manual_seed(0)
    epsilon, noise = (torch.randn(photo.shape, generator=generator) for _ in range(2))
    ours = in_training(stage_ii, photo, epsilon, torch.tensor([400]), noise)
    torch.testing.assert_close(ours["input"], theirs["input"], atol=1e-6, rtol=0)
    assert theirs["class_labels"].tolist() == ours["class_labels"].tolist()
    assert int(theirs["t"]) == int(ours["t"])


def test_noise_level_and_small_image_change_what_the_unet_says(
    stage_ii: DeepFloydIFSuperResolution, photo: Tensor
) -> None:
    unet, noise = stage_ii.load("unet"), normal(photo.shape, "noise")
    text = {"encoder_hidden_states": normal((1, 77, 24), "text")}

    def say(x: Tensor, level: int) -> Tensor:
        with torch.no_grad():
            conditioning = text | stage_ii.image_conditioning(x, noise, replace(LOW, noise_level=level))
            return stage_ii.predict(unet, photo, torch.tensor([300]), conditioning)

    base = say(photo, 0)
    assert not torch.allclose(base, say(photo, 500), atol=1e-4)
    assert not torch.allclose(base, say(-photo, 0), atol=1e-4)


def test_samples_are_enlarged_as_diffusers_chained_pipelines_do(
    stage_i: DeepFloydIF, stage_ii: DeepFloydIFSuperResolution
) -> None:
    large = replace(SETTINGS, resolution=64)
    prompts, seeds = ["a dog", "a cat"], [3, 4]
    small = sample(load_pipeline(stage_i, SETTINGS, CPU), prompts, seeds, SETTINGS)
    pipeline = load_pipeline(stage_ii, large, CPU)
    ours = sample(pipeline, prompts, seeds, large, small, noise_level=LOW.noise_level)
    first = IFPipeline.from_pretrained(stage_i.folder)
    second = IFSuperResolutionPipeline.from_pretrained(stage_ii.folder)
    for image, prompt, seed in zip(ours, prompts, seeds, strict=True):
        settings = {"num_inference_steps": 3, "guidance_scale": 5.0}
        drawn = first(prompt, generator=torch.Generator().manual_seed(seed), **settings).images
        chained = second(
            prompt,
            image=drawn,
            noise_level=LOW.noise_level,
            generator=torch.Generator().manual_seed(seed),
            **settings,
        ).images
        np.testing.assert_array_equal(np.asarray(image), np.asarray(chained[0]))
    together = sample(pipeline, prompts, seeds, replace(large, batch=2), small, noise_level=LOW.noise_level)
    assert np.abs(np.stack(together).astype(int) - np.stack(ours)).max() <= 1


def test_memory_is_planned_for_super_resolution_too(stage_ii: DeepFloydIFSuperResolution) -> None:
    plan = plan_memory(
        stage_ii,
        trained=("unet",),
        rows=2,
        resolution=64,
        precision="bf16",
        zero_stage=2,
        workers=1,
        offload="none",
        gradient_checkpointing=False,
    )
    assert plan.parameters == sum(parameter.numel() for parameter in stage_ii.load("unet").parameters())
    assert plan.activations > 0


def test_the_small_image_is_what_stage_i_sees_of_the_photo(stage_ii: DeepFloydIFSuperResolution, photo: Tensor) -> None:
    """Made small from the large photo, or by Pillow as stage I's training images are: nearly the same."""
    large = Image.fromarray(((photo[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())
    by_pillow = to_pixels([large.resize((32, 32), Image.Resampling.LANCZOS)])
    enlarged = interpolate(by_pillow, (64, 64), mode="bilinear", align_corners=True)
    conditioning = stage_ii.image_conditioning(photo, torch.zeros_like(photo), replace(LOW, noise_level=0))
    assert (conditioning["upscaled"] - enlarged).abs().mean() < 0.02
    nearest = interpolate(photo, (32, 32), mode="nearest")
    aliased = interpolate(nearest, (64, 64), mode="bilinear", align_corners=True)
    assert (aliased - enlarged).abs().mean() > 0.04
