"""Starting points, one line a family in its own file; every value can be set by hand.

Steps, learning rates and image counts: Stable Diffusion from Ruiz et al. (lr 5e-6, about 1000 iterations) and
diffusers' DreamBooth guide (400-800 steps, 200 class images, 2e-6 with the text encoder); SDXL from practitioners'
full fine-tunes (4e-7 to 2e-6, text encoders frozen), for which nobody publishes a tuned recipe; DeepFloyd IF from
diffusers' DreamBooth guide (IF-I-XL 1e-7, IF-II 5e-6; sampler steps and guidance are its pipelines' own). Textual
Inversion: diffusers' guide (3000 steps, 5e-4 times a batch of 4), for all backbones. Class-prior
images are drawn by an ancestral sampler, in pixel space by the one that keeps pixels within their range.

On a machine, learning rates, and on one GPU of 24 GB steps and batch, are those of the families; where the batch is
larger, the steps are fewer, so that as many images are seen. Offloading and checkpointing are the least that, by the
memory plan at full size (Stable Diffusion 1.x, SDXL, IF-I-XL, IF-II-L) with class-prior images where they are used,
leaves 3 GiB for buffers. IF-II-L shares ZeRO and offloading with stage I. No row has been run on such a machine yet.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """Defaults of a backbone: optimizer steps and learning rates, Textual Inversion's too, and how images are drawn."""

    steps: int
    learning_rate: float
    learning_rate_with_text_encoder: float
    batch: int
    inversion_steps: int
    inversion_learning_rate: float
    prior_images: int
    sampler_steps: int
    guidance: float
    prior_scheduler: str


EULER, DDPM = "EulerAncestralDiscreteScheduler", "DDPMScheduler"

#                 steps lr    with text batch inversion   priors sampler guidance scheduler
EMBEDDED = Preset(150,  1e-4, 2e-5,     4,    300,  5e-3, 64,    20,     5.0,     EULER)  # fmt: skip
"""Those of the backbone that ships with the project."""


@dataclass(frozen=True)
class Machine:
    """GPUs that train one subject, and the memory of each in GB."""

    gpus: int
    gigabytes: int

    @property
    def bytes(self) -> int:
        """Memory of one GPU; makers' GB, which some of their GPUs exceed."""
        return self.gigabytes * 10**9


MACHINES = {"1x24GB": Machine(1, 24), "1x80GB": Machine(1, 80), "8x80GB": Machine(8, 80)}


@dataclass(frozen=True)
class MachinePreset:
    """Defaults of a family on a machine; what is not here is the family's."""

    steps: int
    learning_rate: float
    batch: int
    resolution: int
    """That at which the memory is counted; a backbone is trained at its own."""
    precision: str
    zero_stage: int
    offload: str
    gradient_checkpointing: bool
