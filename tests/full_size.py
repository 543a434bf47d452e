"""Folders of full-size models without their weights: the public configurations, which is all that planning reads.

The U-Nets of DeepFloyd IF are as diffusers saved them with models that were fine-tuned from IF-I-XL-v1.0
(huggingface.co/lucostiguy11/dreambooth_if) and IF-II-L-v1.0 (williamberman/dreambooth_me_upscale), and as its script
scripts/convert_if.py makes them; the schedulers are that script's. T5 is google/t5-v1_1-xxl.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.small_tokenizers import small_t5_tokenizer
from tests.untrained import make_tokenizer

_CROSS, _PLAIN = "CrossAttn{}Block2D", "{}Block2D"
_STABLE_DIFFUSION_UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "down_block_types": [_CROSS.format("Down")] * 3 + [_PLAIN.format("Down")],
    "up_block_types": [_PLAIN.format("Up")] + [_CROSS.format("Up")] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
_SDXL_UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 128,
    "down_block_types": [_PLAIN.format("Down")] + [_CROSS.format("Down")] * 2,
    "up_block_types": [_CROSS.format("Up")] * 2 + [_PLAIN.format("Up")],
    "block_out_channels": [320, 640, 1280],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_IF_UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 6,
    "down_block_types": ["ResnetDownsampleBlock2D"] + ["SimpleCrossAttnDownBlock2D"] * 3,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ["SimpleCrossAttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"],
    "block_out_channels": [704, 1408, 2112, 2816],
    "layers_per_block": 3,
    "act_fn": "gelu",
    "attention_head_dim": 64,
    "cross_attention_dim": 2816,
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 64,
    "resnet_time_scale_shift": "scale_shift",
}
_IF_II_UNET = _IF_UNET | {
    "sample_size": 256,
    "in_channels": 6,
    "down_block_types": ["ResnetDownsampleBlock2D"] * 3 + ["SimpleCrossAttnDownBlock2D"] * 2,
    "up_block_types": ["SimpleCrossAttnUpBlock2D"] * 2 + ["ResnetUpsampleBlock2D"] * 3,
    "block_out_channels": [160, 320, 640, 960, 1280],
    "layers_per_block": [2, 2, 3, 5, 5],
    "cross_attention_dim": 1280,
    "class_embed_type": "timestep",
    "mid_block_scale_factor": 1 / 0.7071,
    "resnet_out_scale_factor": 1 / 0.7071,
    "resnet_skip_time_act": True,
    "time_embedding_act_fn": "gelu",
    "time_embedding_dim": 1280,
}
_AUTOENCODER = {
    "_class_name": "AutoencoderKL",
    "sample_size": 512,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
}
_SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
_IF_NOISE = {"beta_schedule": "squaredcos_cap_v2", "beta_start": 0.0001, "beta_end": 0.02}
_IF_SCHEDULER = _IF_NOISE | {
    "_class_name": "DDPMScheduler",
    "variance_type": "learned_range",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
    "sample_max_value": 1.5,
}
_CLIP_L = {"model_type": "clip_text_model", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
_CLIP_L |= {"num_attention_heads": 12, "vocab_size": 49408, "projection_dim": 768}
_CLIP_G = {"model_type": "clip_text_model", "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
_CLIP_G |= {"num_attention_heads": 20, "vocab_size": 49408, "projection_dim": 1280}
_T5_XXL = {"model_type": "t5", "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
_T5_XXL |= {"vocab_size": 32128, "feed_forward_proj": "gated-gelu"}

_ENCODERS = {
    "stable-diffusion": {"text_encoder": ("CLIPTextModel", _CLIP_L)},
    "sdxl": {"text_encoder": ("CLIPTextModel", _CLIP_L), "text_encoder_2": ("CLIPTextModelWithProjection", _CLIP_G)},
    "deepfloyd-if": {"text_encoder": ("T5EncoderModel", _T5_XXL)},
    "deepfloyd-if-ii": {"text_encoder": ("T5EncoderModel", _T5_XXL)},
}
_PIPELINES = {
    "stable-diffusion": ("StableDiffusionPipeline", _STABLE_DIFFUSION_UNET),
    "sdxl": ("StableDiffusionXLPipeline", _SDXL_UNET),
    "deepfloyd-if": ("IFPipeline", _IF_UNET),
    "deepfloyd-if-ii": ("IFSuperResolutionPipeline", _IF_II_UNET),
}
_SCHEDULERS = {
    "stable-diffusion": {"scheduler": _SCHEDULER},
    "sdxl": {"scheduler": _SCHEDULER},
    "deepfloyd-if": {"scheduler": _IF_SCHEDULER},
    "deepfloyd-if-ii": {
        "scheduler": _IF_SCHEDULER | {"sample_max_value": 1.0},
        "image_noising_scheduler": _IF_NOISE | {"_class_name": "DDPMScheduler"},
    },
}
FULL_SIZE = tuple(_PIPELINES)
"""The families whose configuration is here."""


def write_full_size(folder: Path, family: str) -> Path:
    """A folder of Stable Diffusion 1.x, SDXL, IF-I-XL or IF-II-L without weights; its tokenizer is a small one."""
    pipeline, unet = _PIPELINES[family]
    index: dict[str, Any] = {"_class_name": pipeline}
    for name, config in _SCHEDULERS[family].items():
        index[name] = ["diffusers", "DDPMScheduler"]
        _write(folder / name / "scheduler_config.json", config)
    networks = {"unet": ("diffusers", "UNet2DConditionModel", unet)}
    cascaded = family.startswith("deepfloyd-if")
    if not cascaded:
        networks["vae"] = ("diffusers", "AutoencoderKL", _AUTOENCODER)
    for name, (kind, config) in _ENCODERS[family].items():
        networks[name] = ("transformers", kind, config)
        tokenizer = small_t5_tokenizer() if cascaded else make_tokenizer(2000)
        tokenizer.save_pretrained(folder / name.replace("text_encoder", "tokenizer"))
        index[name.replace("text_encoder", "tokenizer")] = ["transformers", type(tokenizer).__name__]
    for name, (library, kind, config) in networks.items():
        index[name] = [library, kind]
        _write(folder / name / "config.json", config)
        (folder / name / "model.safetensors").touch()
    _write(folder / "model_index.json", index)
    return folder


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
