"""The autoencoder: 64 x 64 pixels to 16 x 16 latents, trained for squared error, latents normalized afterwards."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from dreambooth.embedded.build.pool import Pool
from dreambooth.embedded.build.training import (
    Clock,
    Recipe,
    autocast,
    batches,
    chunks,
    load_average,
    on_device,
    to_pixels,
    train,
)

SEED = 11
KL_WEIGHT = 1e-5


def new_vae(channels: tuple[int, ...], latent_channels: int, size: int) -> AutoencoderKL:
    """An untrained AutoencoderKL that halves the side once for each width after the first."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        latent_channels=latent_channels,
        layers_per_block=1,
        norm_num_groups=min(16, channels[0]),
        sample_size=size,
        scaling_factor=1.0,
        force_upcast=False,
        mid_block_add_attention=False,
    )


def train_vae(vae: AutoencoderKL, pool: Pool, recipe: Recipe, folder: Path, clock: Clock) -> None:
    """Train on the pool's pictures; `folder` holds the checkpoint."""
    vae.to(clock.device, memory_format=torch.channels_last)
    images = on_device(pool.images, clock.device)

    def loss_of(step: int) -> torch.Tensor:
        rows = on_device(batches(len(images), recipe.batch, SEED, step), clock.device)
        pixels = to_pixels(images[rows]).contiguous(memory_format=torch.channels_last)
        with autocast(clock.device):
            posterior = vae.encode(pixels).latent_dist
            restored = vae.decode(posterior.sample()).sample
        error = F.mse_loss(restored.float(), pixels) + 0.1 * F.l1_loss(restored.float(), pixels)
        return error + KL_WEIGHT * posterior.kl().float().mean() / posterior.mean[0].numel()

    train(vae, loss_of, recipe, folder, clock)


def finished_vae(vae: AutoencoderKL, pool: Pool, folder: Path, device: torch.device) -> AutoencoderKL:
    """The trained autoencoder with latents of zero mean and unit variance, folded into its own quantization convs.

    `StableDiffusionXLPipeline` reads `latents_mean` and `latents_std` for four channels only, and other code forgets
    them; weights that already yield normalized latents leave nothing to forget.
    """
    load_average(folder, vae)
    vae.to(device).requires_grad_(False)
    sample = pool.images[:: max(1, len(pool.images) // 2000)][:2000]
    means = torch.cat(
        [vae.encode(to_pixels(on_device(sample[part], device))).latent_dist.mean for part in chunks(len(sample), 64)]
    )
    mean, std = means.mean((0, 2, 3)), means.std((0, 2, 3))
    channels = len(mean)
    with torch.no_grad():
        quant, post = vae.quant_conv, vae.post_quant_conv
        quant.bias[:channels] = (quant.bias[:channels] - mean) / std
        quant.weight[:channels] /= std[:, None, None, None]
        quant.bias[channels:] -= 2 * std.log()
        post.bias += post.weight[:, :, 0, 0] @ mean
        post.weight *= std[None, :, None, None]
    return vae


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: np.ndarray, device: torch.device) -> float:
    """Mean peak signal-to-noise ratio in dB of pictures uint8 (N, H, W, 3) encoded and decoded."""
    values = []
    for part in chunks(len(images), 64):
        pixels = to_pixels(on_device(images[part], device))
        restored = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        error = ((restored - pixels) / 2).square().mean((1, 2, 3))
        values.append(-10 * torch.log10(error))
    return float(torch.cat(values).mean())
