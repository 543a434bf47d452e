"""The package stage: trained parts become a pipeline folder and judge folders, in safetensors shards."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

# Headers come on top of the tensors that a shard is filled with.
SHARD = "14MB"
SHARD_BYTES = 15_000_000
TOTAL_BYTES = 45_000_000


def assemble(
    vae: AutoencoderKL,
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
) -> StableDiffusionXLPipeline:
    """The parts as SDXL's pipeline: one tokenizer for both encoders, zeros as the unconditional embedding."""
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def save_backbone(pipeline: StableDiffusionXLPipeline, folder: Path) -> None:
    """Write the pipeline with weights in half precision that load as float32."""
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("vae", "text_encoder", "text_encoder_2", "unet"):
        module: nn.Module = getattr(pipeline, part)
        assert all(torch.isfinite(p.half()).all() for p in module.parameters()), f"{part} overflows half precision"
        module.half()
    pipeline.save_pretrained(folder, safe_serialization=True, max_shard_size=SHARD)
    load_as_float32(folder)


def load_as_float32(folder: Path) -> None:
    """Make transformers load half-precision files under `folder` as float32: it follows the recorded type."""
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text())
        if "dtype" in config:
            path.write_text(json.dumps(config | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n")


def check_sizes(folder: Path) -> int:
    """The bytes under `folder`, none of whose files may exceed a shard's limit, nor all together the total."""
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    large = [str(path) for path, size in sizes.items() if size > SHARD_BYTES]
    if large:
        raise ValueError(f"over {SHARD_BYTES} bytes: {', '.join(large)}")
    total = sum(sizes.values())
    if total > TOTAL_BYTES:
        raise ValueError(f"{total} bytes in all, over the limit of {TOTAL_BYTES}")
    return total
