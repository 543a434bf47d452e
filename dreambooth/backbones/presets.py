"""Starting points, one line a backbone; every value can be set by hand.

Steps, learning rates and image counts: Stable Diffusion from Ruiz et al. (lr 5e-6, about 1000 iterations) and
diffusers' DreamBooth guide (400-800 steps, 200 class images, 2e-6 with the text encoder); SDXL from practitioners'
full fine-tunes (4e-7 to 2e-6, text encoders frozen), for which nobody publishes a tuned recipe; DeepFloyd IF from
diffusers' DreamBooth guide (IF-I-XL 1e-7, IF-II 5e-6; sampler steps and guidance are its pipelines' own). Textual
Inversion: diffusers' guide (3000 steps, 5e-4 times a batch of 4), for all backbones. Class-prior
images are drawn by an ancestral sampler, in pixel space by the one that keeps pixels within their range.
"""

from __future__ import annotations

from dataclasses import dataclass

from dreambooth.backbones import Backbone


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


_EULER, _DDPM = "EulerAncestralDiscreteScheduler", "DDPMScheduler"

PRESETS: dict[str, Preset] = {
    #                          steps lr    with text  batch  inversion   priors  sampler steps  guidance  scheduler
    "embedded":         Preset(150,  1e-4, 2e-5,      4,     300,  5e-3, 64,     20,            5.0,      _EULER),
    "stable-diffusion": Preset(800,  5e-6, 2e-6,      2,     3000, 2e-3, 200,    50,            7.5,      _EULER),
    "sdxl":             Preset(800,  1e-6, 5e-7,      4,     3000, 2e-3, 200,    40,            5.0,      _EULER),
    "deepfloyd-if":     Preset(1000, 1e-7, 5e-8,      4,     3000, 2e-3, 200,    100,           7.0,      _DDPM),
    "deepfloyd-if-ii":  Preset(1000, 5e-6, 2e-6,      2,     3000, 2e-3, 200,    50,            4.0,      _DDPM),
}  # fmt: skip


def preset_of(backbone: Backbone) -> Preset:
    """The preset of the embedded backbone, or else of the backbone's family."""
    return PRESETS["embedded" if backbone.source == "embedded" else backbone.family]


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


# Learning rates, and on one GPU of 24 GB steps and batch, are those of the families above; where the batch is larger,
# the steps are fewer, so that as many images are seen. Offloading and checkpointing are the least that, by the memory
# plan at full size (Stable Diffusion 1.x, SDXL, IF-I-XL, IF-II-L) with class-prior images where they are used, leaves
# 3 GiB for buffers. IF-II-L shares ZeRO and offloading with stage I. No row has been run on such a machine yet.
MACHINE_PRESETS: dict[tuple[str, str], MachinePreset] = {
    #                                              steps lr    batch resolution precision ZeRO offload checkpointing
    ("stable-diffusion", "1x24GB"): MachinePreset(800,  5e-6, 2,    512,       "bf16",   2,   "none", False),
    ("stable-diffusion", "1x80GB"): MachinePreset(400,  5e-6, 4,    512,       "bf16",   2,   "none", False),
    ("stable-diffusion", "8x80GB"): MachinePreset(200,  5e-6, 8,    512,       "bf16",   2,   "none", False),
    ("sdxl",             "1x24GB"): MachinePreset(800,  1e-6, 4,    1024,      "bf16",   2,   "cpu",  True),
    ("sdxl",             "1x80GB"): MachinePreset(800,  1e-6, 4,    1024,      "bf16",   2,   "none", True),
    ("sdxl",             "8x80GB"): MachinePreset(400,  1e-6, 8,    1024,      "bf16",   2,   "none", False),
    ("deepfloyd-if",     "1x24GB"): MachinePreset(1000, 1e-7, 4,    64,        "bf16",   2,   "cpu",  False),
    ("deepfloyd-if",     "1x80GB"): MachinePreset(1000, 1e-7, 4,    64,        "bf16",   2,   "none", True),
    ("deepfloyd-if",     "8x80GB"): MachinePreset(500,  1e-7, 8,    64,        "bf16",   2,   "none", False),
    ("deepfloyd-if-ii",  "1x24GB"): MachinePreset(1000, 5e-6, 2,    256,       "bf16",   2,   "cpu",  False),
    ("deepfloyd-if-ii",  "1x80GB"): MachinePreset(1000, 5e-6, 2,    256,       "bf16",   2,   "none", False),
    ("deepfloyd-if-ii",  "8x80GB"): MachinePreset(250,  5e-6, 8,    256,       "bf16",   2,   "none", False),
}  # fmt: skip


def machine_preset(backbone: Backbone, machine: str) -> MachinePreset:
    """The preset of the backbone's family on one of `MACHINES`; the embedded backbone has none: ValueError."""
    if backbone.source == "embedded":
        raise ValueError(f"--preset {machine} is for full-size backbones: give one with --backbone, or leave it out")
    return MACHINE_PRESETS[backbone.family, machine]
