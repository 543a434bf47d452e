"""What training and sampling need to know of a text-to-image model: the protocol that every family fills in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dreambooth.backbones.files import ModelFolder
from dreambooth.backbones.latents import AutoencoderLatents, Latents
from dreambooth.backbones.presets import EMBEDDED, MachinePreset, Preset
from dreambooth.backbones.text import Conditioning, Text
from dreambooth.objectives import Objective, read_objective


@dataclass(frozen=True)
class LowResolution:
    """The small image that super-resolution enlarges: its side in pixels, and the level of the noise laid on it."""

    side: int
    noise_level: int


class Backbone(ModelFolder, ABC):
    """A text-to-image model: its files, and what its family says of latents, text, objective and conditioning."""

    family: ClassVar[str]
    pipeline_classes: ClassVar[tuple[str, ...]]
    """The diffusers pipelines by whose name in `model_index.json` the family is known."""
    latents_kind: ClassVar[type[Latents]] = AutoencoderLatents
    text_kind: ClassVar[type[Text]]
    family_preset: ClassVar[Preset]
    """The family's starting points; `preset` is the backbone's own."""
    machine_presets: ClassVar[Mapping[str, MachinePreset]] = {}
    """Starting points on GPUs, by the name of the machine (`presets.MACHINES`)."""

    def __init__(self, folder: Path, index: Mapping[str, Any], source: str) -> None:
        """Keep the folder and its parsed `model_index.json`.

        Raises ValueError when weights are missing or pickled, or when the scheduler is not one to train by.
        """
        super().__init__(folder, index, source)
        networks = (self.denoiser, *self.image_encoders, *self.text_encoders)
        for name in networks:
            self._check_weights(name)
        for name in (*networks, *self.text_kind.tokenizer_names):
            if not isinstance(index.get(name), list):
                raise ValueError(f"backbone {source!r} is incomplete: its model_index.json names no {name}")
        _ = self.objective  # read now: an untrainable one is the user's to know before anything is started

    @property
    def image_encoders(self) -> tuple[str, ...]:
        """Component names of the networks that encode images; none where the denoiser works on pixels."""
        return self.latents_kind.networks

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Component names of the text encoders."""
        return self.text_kind.encoders

    @cached_property
    def latents(self) -> Latents:
        """The space in which the denoiser works."""
        return self.latents_kind(self, self.denoiser_multiple)

    @cached_property
    def text(self) -> Text:
        """The tokenizers and text encoders."""
        return self.text_kind(self)

    @cached_property
    def objective(self) -> Objective:
        """What the denoiser learns, as the backbone's scheduler states it."""
        config = self.scheduler_config()
        try:
            return read_objective(config)
        except ValueError as error:
            raise ValueError(f"backbone {self.source!r} is not trainable here: {error}") from error

    @property
    def preset(self) -> Preset:
        """Where to start: the embedded backbone's own, or else its family's."""
        return EMBEDDED if self.source == "embedded" else self.family_preset

    def machine_preset(self, machine: str) -> MachinePreset:
        """Where to start on one of `presets.MACHINES`; the embedded backbone has none: ValueError."""
        if self.source == "embedded" or machine not in self.machine_presets:
            raise ValueError(
                f"--preset {machine} is for full-size backbones: give one with --backbone, or leave it out"
            )
        return self.machine_presets[machine]

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

    # -- the denoiser --------------------------------------------------------------------------------------------------

    @cached_property
    def denoiser_config(self) -> dict[str, Any]:
        """The denoiser's configuration, as its file states it."""
        return self.config(self.denoiser)

    @property
    def denoiser_multiple(self) -> int:
        """What the sides of latents must be multiples of: a U-Net halves them between its levels."""
        return 2 ** (len(self.denoiser_config["block_out_channels"]) - 1)

    @property
    def default_resolution(self) -> int:
        """The side in pixels that the backbone was trained for."""
        return int(self.denoiser_config["sample_size"]) * self.latents.pixels_per_latent

    def size_conditioning(
        self,
        original_size: tuple[int, int],
        crop_top_left: tuple[int, int],
        target_size: tuple[int, int],
    ) -> Conditioning:
        """The conditioning of one image on its own size and crop, (height, width) and (top, left), without a batch."""
        return {}

    def image_conditioning(self, x: Tensor, noise: Tensor, low: LowResolution) -> Conditioning:
        """The conditioning of super-resolution on a small form of the images `x` (B, 3, H, W), with `noise` like x."""
        return {}

    @abstractmethod
    def predict(self, denoiser: nn.Module, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's prediction for noisy latents `z_t` (B, C, h, w) at times `t` (B,); same shape as `z_t`."""
