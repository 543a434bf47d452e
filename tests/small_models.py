"""Small models from configurations, with the classes and the quirks of the real ones, written as users' folders are."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    IFPipeline,
    IFSuperResolutionPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTModel,
)

from tests.small_tokenizers import small_t5_tokenizer
from tests.untrained import make_tokenizer, text_config

_BLOCKS = {
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}


def write_stable_diffusion(folder: Path, prediction_type: str = "epsilon") -> Path:
    """A Stable Diffusion folder for 32x32 pixels; `v_prediction` makes it one of the 2.x kind."""
    torch.manual_seed(1)
    tokenizer = make_tokenizer(2000)
    StableDiffusionPipeline(
        vae=_autoencoder(scaling_factor=0.18215),
        text_encoder=CLIPTextModel(text_config(tokenizer, 24)),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**_BLOCKS, cross_attention_dim=24, attention_head_dim=2),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            prediction_type=prediction_type,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def write_sdxl(folder: Path) -> Path:
    """An SDXL folder for 32x32 pixels: text encoders of two widths, a pooled embedding and micro-conditioning."""
    torch.manual_seed(2)
    tokenizer = make_tokenizer(2000)
    StableDiffusionXLPipeline(
        vae=_autoencoder(scaling_factor=0.13025, force_upcast=True),
        text_encoder=CLIPTextModel(text_config(tokenizer, 16)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer, 24)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(
            **_BLOCKS,
            cross_attention_dim=40,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


_IF_BLOCKS = {
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "block_out_channels": (16, 32),
    "out_channels": 6,
    "norm_num_groups": 8,
    "act_fn": "gelu",
    "attention_head_dim": 8,
    "cross_attention_dim": 32,
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim": 24,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 2,
    "resnet_time_scale_shift": "scale_shift",
}
_IF_II_BLOCKS = _IF_BLOCKS | {
    "class_embed_type": "timestep",
    "mid_block_scale_factor": 1 / 0.7071,
    "resnet_out_scale_factor": 1 / 0.7071,
    "resnet_skip_time_act": True,
    "time_embedding_act_fn": "gelu",
    "time_embedding_dim": 32,
}
_IF_NOISE = {"beta_schedule": "squaredcos_cap_v2", "beta_start": 0.0001, "beta_end": 0.02}
_IF_OFF = {"safety_checker": None, "feature_extractor": None, "watermarker": None, "requires_safety_checker": False}


def write_deepfloyd_if(folder: Path) -> Path:
    """A stage I of DeepFloyd IF for 32x32 pixels: T5, no autoencoder, a learned variance beside epsilon."""
    torch.manual_seed(4)
    tokenizer = small_t5_tokenizer()
    IFPipeline(
        tokenizer=tokenizer,
        text_encoder=_t5(len(tokenizer)),
        unet=UNet2DConditionModel(**_IF_BLOCKS, sample_size=32, in_channels=3, layers_per_block=1),
        scheduler=_if_scheduler(sample_max_value=1.5),
        **_IF_OFF,
    ).save_pretrained(folder)
    return folder


def write_deepfloyd_if_super_resolution(folder: Path) -> Path:
    """A stage II of DeepFloyd IF for 64x64 pixels: the small image beside the noisy one, its noise level as a class."""
    torch.manual_seed(5)
    tokenizer = small_t5_tokenizer()
    unet = UNet2DConditionModel(**_IF_II_BLOCKS, sample_size=64, in_channels=6, layers_per_block=(1, 2))
    IFSuperResolutionPipeline(
        tokenizer=tokenizer,
        text_encoder=_t5(len(tokenizer)),
        unet=unet,
        scheduler=_if_scheduler(sample_max_value=1.0),
        image_noising_scheduler=DDPMScheduler(**_IF_NOISE),
        **_IF_OFF,
    ).save_pretrained(folder)
    return folder


def write_upscaler(folder: Path) -> Path:
    """An upscaler by 4: its U-Net sees the small image beside latents of the same size, and its noise as a class."""
    torch.manual_seed(6)
    tokenizer = make_tokenizer(2000)
    noise = {"beta_schedule": "scaled_linear", "beta_start": 0.0001, "beta_end": 0.02}
    StableDiffusionUpscalePipeline(
        vae=_autoencoder(scaling_factor=0.08333),
        text_encoder=CLIPTextModel(text_config(tokenizer, 24)),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            **_BLOCKS,
            in_channels=7,
            cross_attention_dim=24,
            attention_head_dim=8,
            use_linear_projection=True,
            only_cross_attention=(True, False),
            num_class_embeds=1000,
        ),
        low_res_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        scheduler=DDIMScheduler(**noise, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False),
        max_noise_level=350,
    ).save_pretrained(folder)
    return folder


def _t5(vocabulary: int) -> T5EncoderModel:
    sizes = {"d_model": 24, "d_kv": 12, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=vocabulary, feed_forward_proj="gated-gelu", **sizes))


def _if_scheduler(sample_max_value: float) -> DDPMScheduler:
    return DDPMScheduler(
        **_IF_NOISE,
        variance_type="learned_range",
        thresholding=True,
        dynamic_thresholding_ratio=0.95,
        sample_max_value=sample_max_value,
    )


def _autoencoder(**options: object) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        **options,
    )


def write_clip(folder: Path) -> Path:
    """A CLIP folder for 32x32 pixels with its processor, at the temperature at which CLIP's training ends."""
    torch.manual_seed(3)
    tokenizer = make_tokenizer(2000)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = CLIPModel(
        CLIPConfig(
            text_config=text_config(tokenizer, 16).to_dict(),
            vision_config={**vision, "image_size": 32, "patch_size": 8, "projection_dim": 16},
            projection_dim=16,
            logit_scale_init_value=math.log(100),
        )
    )
    processor = CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32), tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_dino(folder: Path) -> Path:
    """A vision transformer for 32x32 pixels, of DINO's kind."""
    torch.manual_seed(4)
    config = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder
