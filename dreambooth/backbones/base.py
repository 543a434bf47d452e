"""What training and sampling need to know of a text-to-image model: the protocol that every family fills in."""

from __future__ import annotations

import hashlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import ConfigMixin
from torch import Tensor, nn

from dreambooth.common.location import digest
from dreambooth.objectives.variance_preserving import NoiseSchedule

TokenIds = dict[str, Tensor]
"""Token ids by tokenizer name, each (B, length)."""
Conditioning = dict[str, Tensor]
"""What the denoiser is conditioned on, by name; the first dimension of each is the batch."""

_LIBRARIES = ("diffusers", "transformers")


@dataclass(frozen=True)
class LowResolution:
    """The small image that super-resolution enlarges: its side in pixels, and the level of the noise laid on it."""

    side: int
    noise_level: int


class Backbone(ABC):
    """A text-to-image model on disk: a folder in the layout of diffusers' `save_pretrained`.

    Nothing is loaded until asked for. `source` is what the user named (hub id or path); `folder` holds the files.
    """

    family: ClassVar[str]
    pipeline_classes: ClassVar[tuple[str, ...]]
    denoiser: ClassVar[str] = "unet"
    image_encoders: ClassVar[tuple[str, ...]] = ("vae",)
    """Empty where the denoiser works on the pixels themselves."""
    text_encoders: ClassVar[tuple[str, ...]]
    tokenizer_names: ClassVar[tuple[str, ...]]

    def __init__(self, folder: Path, index: Mapping[str, Any], source: str) -> None:
        """Keep the folder and its parsed `model_index.json`.

        Raises ValueError when weights are missing or pickled, or when the scheduler is not one to train by.
        """
        self.folder = folder
        self.index = index
        self.source = source
        networks = (self.denoiser, *self.image_encoders, *self.text_encoders)
        for name in networks:
            self._check_weights(name)
        for name in (*networks, *self.tokenizer_names):
            if not isinstance(index.get(name), list):
                raise ValueError(f"backbone {source!r} is incomplete: its model_index.json names no {name}")
        _ = self.schedule  # read now: an untrainable one is the user's to know before anything is started

    def _check_weights(self, component: str) -> None:
        files = [path.name for path in (self.folder / component).glob("*")]
        if any(name.endswith(".safetensors") for name in files):
            return
        pickled = sorted(name for name in files if name.endswith((".bin", ".pt", ".ckpt", ".pth")))
        if pickled:
            raise ValueError(
                f"backbone {self.source!r} holds {component} only as a pickle ({pickled[0]}), which can run code "
                "when it is read: convert it with diffusers' save_pretrained(..., safe_serialization=True), or use a "
                "revision with safetensors"
            )
        raise ValueError(f"backbone {self.source!r} is incomplete: no {component}/*.safetensors in {self.folder}")

    # -- files ---------------------------------------------------------------------------------------------------------

    @cached_property
    def files(self) -> dict[str, int]:
        """The files that make up the backbone, as {relative path: size in bytes}."""
        folders = [name for name, entry in self.index.items() if isinstance(entry, list) and name != "safety_checker"]
        paths = [self.folder / "model_index.json"]
        for name in folders:
            found = [path for path in (self.folder / name).rglob("*") if path.suffix in {".json", ".txt", ".model"}]
            weights = list((self.folder / name).rglob("*.safetensors"))
            whole = [path for path in weights if ".fp16." not in path.name]
            paths += found + (whole or weights)
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in sorted(paths)}

    @cached_property
    def variant(self) -> str | None:
        """`fp16` when that is the only form in which the denoiser's weights are there."""
        names = [path for path in self.files if path.startswith(f"{self.denoiser}/") and path.endswith(".safetensors")]
        return "fp16" if all(".fp16." in name for name in names) else None

    @cached_property
    def hash(self) -> str:
        """The hex digest of all its files: two folders with the same weights and configuration share it."""
        hashes = {}
        for name in self.files:
            with (self.folder / name).open("rb") as stream:
                hashes[name] = hashlib.file_digest(stream, "sha256").hexdigest()
        return digest(hashes)

    # -- loading -------------------------------------------------------------------------------------------------------

    def _class(self, component: str) -> Any:
        library, name = self.index[component]
        if library not in _LIBRARIES:
            raise ValueError(f"backbone {self.source!r}: {component} comes from {library!r}, not one of {_LIBRARIES}")
        return getattr(importlib.import_module(library), name)

    def load(self, component: str, dtype: torch.dtype = torch.float32, trained: Path | None = None) -> nn.Module:
        """One network of the backbone, or of its kind in the folder `trained`, on the CPU in evaluation mode."""
        folder, variant = (self.folder, self.variant) if trained is None else (trained, None)
        network = self._class(component).from_pretrained(
            folder, subfolder=component, dtype=dtype, variant=variant, use_safetensors=True
        )
        return network.eval()

    def empty(self, component: str) -> nn.Module:
        """One network with its shapes but no storage (torch's meta device), from its configuration alone."""
        kind = self._class(component)
        with torch.device("meta"):
            if issubclass(kind, ConfigMixin):
                return kind.from_config(kind.load_config(self.folder, subfolder=component)).eval()
            return kind(kind.config_class.from_pretrained(self.folder, subfolder=component)).eval()

    @cached_property
    def tokenizers(self) -> dict[str, Any]:
        """The tokenizers by name, in the order of `text_encoders`."""
        return {name: self._class(name).from_pretrained(self.folder, subfolder=name) for name in self.tokenizer_names}

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule and prediction type that the backbone's scheduler states."""
        return self._read_schedule("scheduler")

    def _read_schedule(self, component: str) -> NoiseSchedule:
        try:
            config = DDPMScheduler.load_config(self.folder, subfolder=component)
        except OSError as error:
            raise ValueError(f"backbone {self.source!r} is incomplete: no {component} in {self.folder}") from error
        if "beta_start" not in config:
            raise ValueError(
                f"backbone {self.source!r} has {config.get('_class_name')}, which has no variance-preserving noise "
                "schedule: such a model is not trainable here"
            )
        scheduler = DDPMScheduler.from_config(config)
        return NoiseSchedule(scheduler.alphas_cumprod, scheduler.config.prediction_type)

    def pipeline(self, dtype: torch.dtype, replacements: Mapping[str, Any] | None = None) -> Any:
        """diffusers' own pipeline of this backbone, without watermarker or safety checker.

        `replacements` are networks and such to use instead of the backbone's, by component name.
        """
        import diffusers

        kind = getattr(diffusers, str(self.index["_class_name"]))
        pipeline = kind.from_pretrained(
            self.folder,
            dtype=dtype,
            variant=self.variant,
            use_safetensors=True,
            **self._pipeline_options(),
            **(replacements or {}),
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _pipeline_options(self) -> dict[str, Any]:
        return {}

    def trained_parts(self) -> dict[str, Any]:
        """What a trained denoiser needs besides itself instead of the backbone's, by component name."""
        return {}

    # -- images and latents --------------------------------------------------------------------------------------------

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        """The autoencoder's configuration, with the class's defaults where the file is silent."""
        config: Any = self.empty("vae").config
        return dict(config)

    @cached_property
    def denoiser_config(self) -> dict[str, Any]:
        """The denoiser's configuration, as its file states it."""
        return dict(self._class(self.denoiser).load_config(self.folder, subfolder=self.denoiser))

    @property
    def pixels_per_latent(self) -> int:
        """The side of the square of pixels that one latent stands for; a resolution must be a multiple of it."""
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(channels, height, width) of the latent of a square image."""
        side = resolution // self.pixels_per_latent
        return (self.vae_config["latent_channels"], side, side)

    @property
    def default_resolution(self) -> int:
        """The side in pixels that the backbone was trained for."""
        return int(self.denoiser_config["sample_size"]) * self.pixels_per_latent

    @property
    def side_multiple(self) -> int:
        """What the sides of an image must be multiples of, in pixels, for the denoiser to take its latents."""
        return self.pixels_per_latent * 2 ** (len(self.denoiser_config["block_out_channels"]) - 1)

    def check_resolution(self, resolution: int) -> None:
        """Raise ValueError unless the denoiser can take latents of this image side."""
        if resolution <= 0 or resolution % self.side_multiple:
            raise ValueError(
                f"a resolution of {resolution} does not fit this backbone: use a multiple of {self.side_multiple}"
            )

    @torch.no_grad()
    def encode_images(self, encoders: Mapping[str, Any], pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents of `pixels` (B, 3, H, W) in [-1, 1]; each (B, C, h, w) in float32.

        Raises ArithmeticError when they are not finite (SDXL's autoencoder overflows in float16).
        """
        vae = encoders["vae"]
        posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        if not (mean.isfinite().all() and log_variance.isfinite().all()):
            raise ArithmeticError(f"the autoencoder of {self.source!r} gave latents that are not finite")
        return mean, log_variance

    def scale_latents(self, latents: Tensor) -> Tensor:
        """Bring sampled latents (B, C, h, w) to the scale on which the denoiser works."""
        config = self.vae_config
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            mean = torch.tensor(config["latents_mean"]).view(1, -1, 1, 1).to(latents)
            std = torch.tensor(config["latents_std"]).view(1, -1, 1, 1).to(latents)
            return (latents - mean) * config["scaling_factor"] / std
        return (latents - (config.get("shift_factor") or 0.0)) * config["scaling_factor"]

    # -- text ----------------------------------------------------------------------------------------------------------

    def clean_prompt(self, prompt: str) -> str:
        """The prompt as the tokenizers see it, by what diffusers' pipeline makes of it first."""
        return prompt

    def prompt_length(self, tokenizer: Any) -> int:
        """The tokens of a prompt, padding included."""
        return tokenizer.model_max_length

    def tokenize(self, prompts: Sequence[str]) -> TokenIds:
        """Token ids of the prompts for every tokenizer, padded to its full length as diffusers' pipelines do.

        Raises ValueError when a prompt is longer than a tokenizer takes.
        """
        ids = {}
        cleaned = [self.clean_prompt(prompt) for prompt in prompts]
        for name, tokenizer in self.tokenizers.items():
            longest = self.prompt_length(tokenizer)
            for prompt in cleaned:
                length = len(tokenizer(prompt).input_ids)
                if length > longest:
                    raise ValueError(f"the prompt {prompt!r} has {length} tokens; {self.source!r} takes {longest}")
            padded = tokenizer(cleaned, padding="max_length", max_length=longest, return_tensors="pt")
            ids[name] = padded.input_ids
        return ids

    @abstractmethod
    def encode_text(self, encoders: Mapping[str, nn.Module], ids: TokenIds) -> Conditioning:
        """The conditioning of a batch of tokenized prompts; gradients flow into the encoders."""

    # -- denoising -----------------------------------------------------------------------------------------------------

    def size_conditioning(
        self,
        original_size: tuple[int, int],
        crop_top_left: tuple[int, int],
        target_size: tuple[int, int],
    ) -> Conditioning:
        """The conditioning of one image on its own size and crop, (height, width) and (top, left), without a batch."""
        del original_size, crop_top_left, target_size
        return {}

    def image_conditioning(self, x: Tensor, noise: Tensor, low: LowResolution) -> Conditioning:
        """The conditioning of super-resolution on a small form of the images `x` (B, 3, H, W), with `noise` like x."""
        del x, noise, low
        return {}

    @abstractmethod
    def predict(self, denoiser: nn.Module, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's prediction for noisy latents `z_t` (B, C, h, w) at times `t` (B,); same shape as `z_t`."""
