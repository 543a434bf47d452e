"""The options of `personalize.py`: typed, grouped, from the command line or a YAML file."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml

from dreambooth.common.learning_rate import Schedule
from dreambooth.runs import PriorKind


@dataclass(frozen=True)
class SubjectOptions:
    """What to learn. Without any of these, the sample subject that comes with the project."""

    subject: str | None = None
    """Name of the subject in the store: lower-case letters, digits, '-' and '_'. By default from the images' folder."""
    images: tuple[str, ...] = ()
    """Instance images: a folder, glob, file or URI, or several of them. 3-5 photos are usual."""
    class_noun: str | None = None
    """What the subject is, for example "dog". By default the noun that --class-noun-judge finds."""
    class_noun_judge: str | None = None
    """CLIP model that finds missing class nouns: a folder or hub id. By default, beside the embedded backbone, the
    judge that ships with it."""
    identifier: str | None = None
    """The rare token(s) [V] that will name the subject. By default found by the paper's rule."""
    bare_identifier: bool = False
    """Call the subject "[V]" without its class noun, as the paper's ablation in table 4 does."""
    manifest: str | None = None
    """Many subjects: a YAML file, or a folder with one folder a subject. Takes the place of subject, images, class noun
    and identifier above."""
    captions: bool = False
    """Label each photo with the text file beside it (1.txt for 1.jpg), where {subject} stands for "[V] [class noun]".
    By default all are labelled "a [V] [class noun]"."""


@dataclass(frozen=True)
class ModelOptions:
    """The model to start from."""

    backbone: str = "embedded"
    """"embedded", a folder written by diffusers' save_pretrained, or a hub id (Stable Diffusion 1.x/2.x,
    SDXL, stage I of DeepFloyd IF)."""
    super_resolution: str | None = None
    """Train this stage of a cascade too, and enlarge samples with it: stage II of DeepFloyd IF, a folder or hub id."""
    upscaler: str | None = None
    """Enlarge the samples of a cascade once more with this model, as it is: stabilityai/stable-diffusion-x4-upscaler,
    by folder or hub id."""
    noise_level: int | None = None
    """Noise on the small image in super-resolution. By default the level nearest to the paper's lowered 1e-5."""
    resolution: int | None = None
    """Side of the square training images, in pixels. By default the backbone's own."""
    train_text_encoder: bool = False
    """Train the text encoder(s) too."""


@dataclass(frozen=True)
class PriorOptions:
    """Class-prior images and the prior-preservation loss."""

    prior_weight: float = 1.0
    """Weight lambda of the prior-preservation term; 0 trains without it."""
    prior_kind: PriorKind = "images"
    """What the prior term asks for: the class-prior images, as in the paper, or what a frozen copy of the backbone
    (the teacher) predicts for them."""
    prior_images: int | None = None
    """Class-prior images. By default the backbone's preset."""
    prior_steps: int | None = None
    """Sampler steps an image. By default the backbone's preset."""
    prior_guidance: float | None = None
    """Guidance scale. By default the backbone's preset."""
    prior_batch: int | Literal["auto"] = 8
    """Images drawn at once; part of what determines an image, down to rounding. "auto" probes this machine's GPU."""
    prior_scheduler: str | None = None
    """diffusers scheduler class. By default the backbone's preset, which is ancestral, as in the paper."""
    prior_compile: bool = False
    """Run the denoiser through torch.compile: slower to start, faster an image."""
    prior_workers: int | None = None
    """Samplers at work, each with the resources of a training worker. By default all that the cluster has room for."""


@dataclass(frozen=True)
class TrainingOptions:
    """Fine-tuning."""

    method: str = "dreambooth"
    """textual-inversion trains nothing but the embeddings of the identifier's tokens, for comparison: a few KB."""
    method_settings: tuple[str, ...] = ()
    """Settings of the method's own, NAME=VALUE each."""
    steps: int | None = None
    """Optimizer steps. By default the backbone's preset."""
    learning_rate: float | None = None
    """The optimizer's learning rate. By default the backbone's preset."""
    text_encoder_learning_rate: float | None = None
    """The text encoders' own learning rate. By default the same."""
    schedule: Schedule = "constant"
    """What the learning rate does after the warm-up; cosine and linear fall towards 0."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises from 0."""
    batch: int | None = None
    """Instance images a step over all workers; as many class-prior images come on top. By default the preset."""
    gradient_accumulation: int = 1
    """Forward and backward passes a step and worker; the batch is divided among them."""
    min_snr_gamma: float | None = None
    """Weight timesteps by min-SNR with this gamma (5 is usual). By default all weigh 1."""
    offset_noise: float = 0.0
    """Strength of added noise that is one number a channel (0.05-0.1 is usual), for very dark or bright images."""
    ema_decay: float = 0.0
    """Publish an exponential moving average of the weights with this decay (0.999, say); 0 publishes the last ones."""
    weight_decay: float = 1e-2
    """The optimizer's weight decay."""
    max_grad_norm: float = 1.0
    """Clip the gradient's norm to this; 0 does not clip."""
    optimizer: Literal["adamw", "adamw-8bit", "adafactor"] = "adamw"
    """The two with less state need --zero-stage 0 and --precision fp32; adamw-8bit also bitsandbytes and a GPU."""
    flip: bool = False
    """Show photos mirrored half of the time. Leave it off where left and right matter: writing, one-sided markings."""
    random_crop: bool = False
    """Cut photos that are not square at random places, 8 a photo, instead of in the middle."""
    buckets: bool = False
    """Train photos in about their own shape, from 1:2 to 2:1, instead of cut square; a step's photos share one."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """bf16 and fp16 keep float32 masters of the weights. By default bf16 on GPUs, fp32 on CPUs."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time. A --preset may ask for it."""
    compile: bool = False
    """Run the trained denoiser through torch.compile: slower to start, faster a step. Not under --zero-stage 3."""
    checkpoint_every: int = 100
    """Steps between checkpoints, from which a killed run goes on."""
    previews: bool = False
    """Draw the sample prompts with each checkpoint, beside the training and if the cluster has a worker to spare."""


@dataclass(frozen=True)
class ClusterOptions:
    """Workers and memory."""

    preset: Literal["1x24GB", "1x80GB", "8x80GB"] | None = None
    """Defaults for GPUs of this number and memory, here and for steps, batch and precision; other options win."""
    workers: int | None = None
    """Training workers. By default the preset's, or one a local GPU, or else 2 on the CPU."""
    min_workers: int | None = None
    """Go on with so few training workers when nodes are lost, and with more when they come back. By default all."""
    lanes: int | None = None
    """Groups of workers that train subjects side by side. By default as many as the cluster has room for."""
    cpus_per_worker: int = 1
    """CPU cores of a worker; on the CPU also its threads."""
    gpus_per_worker: float | None = None
    """GPUs of a worker. By default 1 with a preset or where this machine has a GPU, else 0; set it when only the
    cluster does."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """DeepSpeed ZeRO: 1 shards optimizer states, 2 gradients too, 3 weights too. By default the preset's, or 2; 0 for
    one worker in fp32."""
    offload: Literal["none", "cpu", "nvme"] | None = None
    """Keep optimizer states (and under stage 3 the weights) in host memory, or under stage 3 on a local disk. By
    default as the preset says, or not."""
    nvme_path: str | None = None
    """Folder on every node's own disk, for --offload nvme; what is in it means nothing after the run."""
    deepspeed: str | None = None
    """JSON file of further settings in DeepSpeed's own form; what an option says is not its to say."""
    device_memory: float | None = None
    """GiB of memory of one device, for the plan. By default this machine's own, or the preset's."""


@dataclass(frozen=True)
class SampleOptions:
    """Samples of the finished model."""

    sample_prompts: tuple[str, ...] = ()
    """Prompts with {subject} for "[V] [class noun]". By default six of the paper's kind."""
    sample_steps: int | None = None
    """Sampler steps. By default the backbone's preset."""
    sample_guidance: float | None = None
    """Guidance scale. By default the backbone's preset."""


@dataclass(frozen=True)
class RunOptions:
    """The run."""

    store: str = "~/dreambooth-store"
    """Subject store: a folder, or a URI such as s3://bucket/store. Every node of a cluster must reach it."""
    seed: int = 0
    """All noise, timesteps and orders follow from it."""
    dry_run: bool = False
    """Check all input, print the plan, and stop."""
    verbose: bool = False
    """Show the logs of Ray, DeepSpeed and the workers here too."""
    config: str | None = None
    """YAML file of these options (`learning_rate: 5e-6`); the command line wins."""


Flat = tyro.conf.OmitArgPrefixes


@dataclass(frozen=True)
class Options:
    """All options of the main job."""

    subject: Annotated[SubjectOptions, Flat] = field(default_factory=SubjectOptions)
    model: Annotated[ModelOptions, Flat] = field(default_factory=ModelOptions)
    prior: Annotated[PriorOptions, Flat] = field(default_factory=PriorOptions)
    training: Annotated[TrainingOptions, Flat] = field(default_factory=TrainingOptions)
    cluster: Annotated[ClusterOptions, Flat] = field(default_factory=ClusterOptions)
    samples: Annotated[SampleOptions, Flat] = field(default_factory=SampleOptions)
    run: Annotated[RunOptions, Flat] = field(default_factory=RunOptions)

    def as_dict(self) -> dict[str, Any]:
        """All options as one flat mapping, as a YAML file holds them."""
        return {name: value for group in asdict(self).values() for name, value in group.items()}


def parse(arguments: Sequence[str], description: str) -> Options:
    """Options from command-line arguments; prints help or the error and exits (0 or 2) as argparse does."""
    try:
        from_file = list(_config_arguments(arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return tyro.cli(
        Options,
        args=[*from_file, *arguments],
        description=description,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def _config_arguments(arguments: Sequence[str]) -> Iterator[str]:
    """The options of the file that `--config` names, in command-line form, so that both are read by one parser."""
    path = _config_path(arguments)
    if path is None:
        return
    try:
        content = yaml.safe_load(Path(path).expanduser().read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: expected a mapping of options to values, found {type(content).__name__}")
    known = {option.name for group in fields(Options) for option in fields(group.default_factory)}  # type: ignore[arg-type]
    known.remove("config")
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            nearest = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)[0]
            raise ValueError(f"--config {path}: unknown key {key!r}; the nearest valid one is {nearest!r}")
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            yield flag if value else flag.replace("--", "--no-", 1)
        elif isinstance(value, list):
            yield flag
            yield from map(str, value)
        else:
            yield flag
            yield str(value)


def _config_path(arguments: Sequence[str]) -> str | None:
    for position, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
        if argument == "--config" and position + 1 < len(arguments):
            return arguments[position + 1]
    return None
