"""What a run has trained, ready to draw: the parts that changed against the backbone, in a pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin
from PIL import Image
from torch import Tensor, nn

from dreambooth.backbones import Backbone
from dreambooth.backbones.precision import DTYPES
from dreambooth.methods.textual_inversion import LEARNED_EMBEDS, LearnedEmbeds
from dreambooth.runs import RunSpec
from dreambooth.sampling.sampler import load_pipeline, sample
from dreambooth.store import SubjectStore


class TrainedStage:
    """A stage of a run: its trained parts as they are published, and the pipeline that draws with them."""

    def __init__(self, store: SubjectStore, run: RunSpec, state: Mapping[str, Tensor]) -> None:
        """Build the pipeline from a checkpoint's state."""
        self._run = run
        self.backbone = store.open_backbone(run.backbone)
        dtype = DTYPES[run.training.precision]
        self.parts: dict[str, Any]
        if run.training.method == "textual-inversion":
            embeds = learned_embeds(self.backbone, run.identifier, state)
            replaced = {name: self.backbone.load(name, dtype) for name in self.backbone.text_encoders}
            embeds.write_into(replaced)
            self.parts = {LEARNED_EMBEDS: embeds}
        else:
            networks = {name: trained_network(self.backbone, name, state, dtype) for name in run.training.trained}
            self.parts = replaced = networks | self.backbone.trained_parts()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._pipeline = load_pipeline(self.backbone, run.samples, device, replaced)

    def draw(self, prompt: str, seed: int, small: Sequence[Image.Image]) -> list[Image.Image]:
        """The image of a prompt; a super-resolution stage enlarges the image that the stage before has drawn."""
        low = self._run.training.low_resolution
        options = {} if low is None else {"noise_level": low.noise_level}
        return sample(self._pipeline, [prompt], [seed], self._run.samples, small, **options)

    def save(self, folder: Path) -> None:
        """Write the trained parts, each to a folder of its name."""
        self._pipeline.to("cpu")
        for name, part in self.parts.items():
            if isinstance(part, ConfigMixin):  # it would write down the folder of this machine that it was read from
                part.register_to_config(_name_or_path=self._run.backbone)
            part.save_pretrained(folder / name)


def trained_network(backbone: Backbone, component: str, state: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """A network of the backbone with the parameters of a checkpoint's state, on the CPU in `dtype`."""
    network = backbone.load(component)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(_published(state, f"networks.{component}.{name}"))
    return network.to(dtype)


def learned_embeds(backbone: Backbone, identifier: str, state: Mapping[str, Tensor]) -> LearnedEmbeds:
    """The embeddings of the identifier that a checkpoint's state holds."""
    embeds = {name: _published(state, f"embeds.{name}") for name in backbone.text_encoders}
    return LearnedEmbeds(backbone, identifier, embeds)


def _published(state: Mapping[str, Tensor], name: str) -> Tensor:
    """The average of a parameter where the checkpoint has one, as at the end, or else the parameter."""
    average = state.get(f"average.{name}")
    return state[f"param.{name}"] if average is None else average


class UpscalingStage:
    """The upscaler of a run, ready to draw."""

    def __init__(self, store: SubjectStore, run: RunSpec) -> None:
        """Load its pipeline."""
        assert run.upscaling is not None
        self._run, self._upscaling = run, run.upscaling
        self._backbone = store.open_backbone(run.upscaling.backbone)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._pipeline = load_pipeline(self._backbone, run.upscaling.samples, device)

    def draw(self, prompt: str, seed: int, small: Sequence[Image.Image]) -> list[Image.Image]:
        """The image that the cascade has drawn of a prompt, enlarged.

        It is told of the class alone: to the upscaler the identifier is some other word, if it is any.
        """
        prompt = prompt.replace(self._run.phrase, self._run.class_noun)
        settings, level = self._upscaling.samples, self._upscaling.noise_level
        return sample(self._pipeline, [prompt], [seed], settings, small, noise_level=level)

    def lineage(self) -> dict[str, Any]:
        """What a version's manifest says of it, besides the settings in its run."""
        return {"backbone": {"family": self._backbone.family, "hash": self._upscaling.backbone}}
