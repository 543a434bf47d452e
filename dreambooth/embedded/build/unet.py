"""The U-Net: v-prediction on normalized latents with zero terminal signal-to-noise, conditioned as SDXL is.

Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", gives the schedule; the frozen text
encoders' states are the context, the pooled text and the size and crop of the picture the added embedding.
"""

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dreambooth.embedded.build.config import UnetConfig
from dreambooth.embedded.build.contrastive import tokenize
from dreambooth.embedded.build.pool import Pool
from dreambooth.embedded.build.text import encode_prompts
from dreambooth.embedded.build.training import Clock, autocast, batches, chunks, on_device, to_pixels, train

SEED = 13
TIME_ID_WIDTH = 32


class Latents(NamedTuple):
    """The cached training set of the U-Net, all rows alike: latents float16 (N, C, h, w), the micro-conditioning
    int16 (N, 6) as (original height, width, crop top, left, target height, width), and caption numbers (N,) into the
    distinct captions' states float16 (M, length, width), pooled float16 (M, projection)."""

    latents: np.ndarray
    time_ids: np.ndarray
    captions: np.ndarray
    states: np.ndarray
    pooled: np.ndarray


def new_scheduler() -> DDIMScheduler:
    """The noise schedule and sampler; `clip_sample` is off, since latents are no pixels."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def new_unet(config: UnetConfig, latent_channels: int, size: int, context: int, pooled: int) -> UNet2DConditionModel:
    """An untrained U-Net of SDXL's kind for latents of side `size`."""
    # As in SDXL, the finest level has no attention.
    deeper = len(config.channels) - 1
    return UNet2DConditionModel(
        sample_size=size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * deeper),
        up_block_types=(*["CrossAttnUpBlock2D"] * deeper, "UpBlock2D"),
        block_out_channels=config.channels,
        layers_per_block=config.layers,
        transformer_layers_per_block=config.transformer_layers,
        attention_head_dim=tuple(max(1, width // config.head_width) for width in config.channels),
        use_linear_projection=True,
        norm_num_groups=min(16, config.channels[0]),
        cross_attention_dim=context,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=6 * TIME_ID_WIDTH + pooled,
    )


@torch.no_grad()
def make_latents(
    pool: Pool,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
    folder: Path,
    clock: Clock,
) -> Latents:
    """Encode pictures and captions once into `folder`, memory-mapped from then on."""
    names = ("latents", "time_ids", "captions", "states", "pooled")
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        vae.to(clock.device)
        distinct = sorted(set(pool.captions))
        number = {caption: index for index, caption in enumerate(distinct)}
        latents, time_ids = [], []
        for part in chunks(len(pool.images), 512):
            pixels, ids = _conditioned(to_pixels(on_device(pool.images[part], clock.device)), part.start)
            with autocast(clock.device):
                posterior = vae.encode(pixels).latent_dist
            latents.append(posterior.mean.cpu().to(torch.float16).numpy())
            time_ids.append(ids)
        for encoder in encoders:
            encoder.to(clock.device)
        tokens = tokenize(tokenizer, distinct).to(clock.device)
        parts = [
            [out.to(torch.float16).cpu().numpy() for out in encode_prompts(encoders, t)] for t in tokens.split(256)
        ]
        arrays = (
            np.concatenate(latents),
            np.concatenate(time_ids),
            np.array([number[caption] for caption in pool.captions], np.int32),
            np.concatenate([states for states, _ in parts]),
            np.concatenate([pooled for _, pooled in parts]),
        )
        for name, array in zip(names, arrays, strict=True):
            np.save(folder / f"{name}.npy", array)
        (folder / "done").write_text(json.dumps({"captions": len(distinct)}))
    return Latents(*(np.load(folder / f"{name}.npy", mmap_mode="c") for name in names))


def _conditioned(pixels: Tensor, start: int) -> tuple[Tensor, np.ndarray]:
    """Make micro-conditioning mean something: an eighth of the pictures come from a smaller original, an eighth are
    crops, half come from a larger original, which does not show. Returns the pictures and their time ids (N, 6)."""
    side = pixels.shape[-1]
    ids = np.tile(np.array([side, side, 0, 0, side, side], np.int16), (len(pixels), 1))
    out = pixels.clone()
    for row in range(len(pixels)):
        rng = np.random.default_rng([SEED, start + row])
        kind = rng.random()
        picture = pixels[row : row + 1]
        if kind < 0.125:
            small = int(rng.integers(side // 2, side))
            shrunk = F.interpolate(picture, size=small, mode="area")
            out[row] = F.interpolate(shrunk, size=side, mode="bilinear")[0]
            ids[row, :2] = small
        elif kind < 0.25:
            large = side + int(rng.integers(1, side // 5))
            top, left = (int(v) for v in rng.integers(0, large - side + 1, 2))
            grown = F.interpolate(picture, size=large, mode="bilinear")
            out[row] = grown[0, :, top : top + side, left : left + side]
            ids[row, 2:4] = top, left
        elif kind < 0.75:
            ids[row, :2] = int(rng.integers(side, 16 * side))
    return out, ids


def stratified_timesteps(count: int, steps: int, generator: torch.Generator) -> Tensor:
    """One timestep (count,) from each of `count` equal parts of the schedule, for less variance than free draws.

    The parts are shuffled: a batch's rows come sorted, and a sample would else see one part in every epoch.
    """
    device = generator.device
    parts = torch.randperm(count, generator=generator, device=device)
    return ((parts + torch.rand(count, generator=generator, device=device)) / count * steps).long()


def train_unet(unet: UNet2DConditionModel, data: Latents, config: UnetConfig, folder: Path, clock: Clock) -> None:
    """Train on cached latents; a tenth of the captions are dropped to zeros for classifier-free guidance."""
    device = clock.device
    unet.to(device, memory_format=torch.channels_last)
    scheduler = new_scheduler()
    steps = scheduler.config.num_train_timesteps
    latents_of, ids_of, caption_of, states_of, pooled_of = (on_device(array, device) for array in data)
    recipe = config.recipe
    predict = torch.compile(unet) if clock.compiled else unet
    # On a CPU the backward pass of fused attention is slower than that of plain matrix products.
    attention = partial(sdpa_kernel, SDPBackend.MATH) if device.type == "cpu" else nullcontext

    def loss_of(step: int) -> Tensor:
        rows = on_device(batches(len(latents_of), recipe.batch, SEED, step), device)
        rng = torch.Generator(device).manual_seed(SEED * 1_000_003 + step)
        latents, captions = latents_of[rows].float(), caption_of[rows].long()
        kept = (torch.rand(len(rows), generator=rng, device=device) >= config.caption_drop).float()
        states = states_of[captions].float() * kept[:, None, None]
        noise = torch.randn(latents.shape, generator=rng, device=device)
        timesteps = stratified_timesteps(len(rows), steps, rng)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        target = scheduler.get_velocity(latents, noise, timesteps)
        conditions = {
            "text_embeds": pooled_of[captions].float() * kept[:, None],
            "time_ids": ids_of[rows].float(),
        }
        with autocast(device), attention():
            predicted = predict(noisy, timesteps, encoder_hidden_states=states, added_cond_kwargs=conditions).sample
        return F.mse_loss(predicted.float(), target)

    train(unet, loss_of, recipe, folder, clock)
