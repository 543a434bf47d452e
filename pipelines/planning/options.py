"""The options of `personalize`: typed, grouped, from the command line or a YAML file."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml

from dreambooth.backbones import PRESETS
from dreambooth.common.learning_rate import Schedule
from dreambooth.methods import METHODS
from dreambooth.runs import PriorKind
from pipelines.planning.command_line import in_words, read_arguments, show_help_if_asked, shown

FIRST = (
    *("images", "class_noun", "manifest", "backbone", "preset", "workers", "steps", "learning_rate", "store"),
    "dry_run",
)
"""The options of a first run, which `--help` shows."""

BY_BACKBONE = {
    **{name: name for name in ("steps", "learning_rate", "batch", "prior_images", "prior_scheduler")},
    **{"prior_steps": "sampler_steps", "prior_guidance": "guidance"},
    **{"sample_steps": "sampler_steps", "sample_guidance": "guidance"},
}
"""Options with a default for each backbone, and the field of its preset that holds it."""


def _by_backbone(option: str, besides: str = "", value: str | None = None) -> Any:
    """The option's default for each backbone, and `besides` what else it depends on."""
    backbones: dict[Any, list[str]] = {}
    for name, preset in PRESETS.items():
        backbones.setdefault(getattr(preset, BY_BACKBONE[option]), []).append(name)
    words = "; ".join(f"{', '.join(names)} {in_words(value)}" for value, names in backbones.items())
    return shown(f"{words}{besides}", value)


@dataclass(frozen=True)
class SubjectOptions:
    """The subject."""

    images: Annotated[tuple[str, ...], shown("the sample subject", "PATH ...")] = ()
    """Photos of the subject, 3-5 as a rule: a folder, glob, file or URI, or several of them."""
    class_noun: Annotated[str | None, shown("what --class-noun-judge finds", "NOUN")] = None
    """What the subject is, for example "dog"."""
    subject: Annotated[str | None, shown("the images' folder", "NAME")] = None
    """Name of the subject in the store: lower-case letters, digits, '-' and '_'."""
    identifier: Annotated[str | None, shown("found by the paper's rule", "WORD")] = None
    """The rare token(s) [V] that name the subject."""
    manifest: Annotated[str | None, shown("", "PATH")] = None
    """Many subjects: a YAML file, or a folder with one folder a subject. Takes the place of --images, --class-noun,
    --subject and --identifier."""
    class_noun_judge: Annotated[str | None, shown("the embedded backbone's own, beside other backbones no model")] = (
        None
    )
    """CLIP model that finds missing class nouns: a folder or hub id."""
    bare_identifier: bool = False
    """Call the subject "[V]" without its class noun, as the paper's ablation in table 4 does."""
    captions: bool = False
    """Train each photo under the text in the file beside it (1.txt for 1.jpg), where {subject} stands for "[V] [class
    noun]". Without it all photos have the prompt "a [V] [class noun]"."""


@dataclass(frozen=True)
class ModelOptions:
    """The backbone."""

    backbone: Annotated[str, shown("embedded", "MODEL")] = "embedded"
    """The model to start from: "embedded", a folder written by diffusers' save_pretrained, or a hub id of Stable
    Diffusion 1.x/2.x, SDXL or stage I of DeepFloyd IF."""
    resolution: Annotated[int | None, shown("the backbone's own", "PIXELS")] = None
    """Side of the square training images."""
    train_text_encoder: bool = False
    """Train the text encoder(s) too."""
    super_resolution: Annotated[str | None, shown("", "MODEL")] = None
    """Train this second stage of a cascade too, and enlarge samples with it: stage II of DeepFloyd IF, a folder or hub
    id."""
    noise_level: Annotated[int | None, shown("the level nearest to the paper's lowered 1e-5", "LEVEL")] = None
    """Noise on the small image in super-resolution."""
    upscaler: Annotated[str | None, shown("", "MODEL")] = None
    """Enlarge the samples of a cascade once more with this model, untrained: stabilityai/stable-diffusion-x4-upscaler,
    by folder or hub id."""


@dataclass(frozen=True)
class PriorOptions:
    """Class-prior images and the prior-preservation loss."""

    prior_weight: Annotated[float, shown("1", "LAMBDA")] = 1.0
    """Weight lambda of the prior-preservation loss; 0 trains without it."""
    prior_images: Annotated[int | None, _by_backbone("prior_images")] = None
    """Class-prior images to draw. Sets are kept in the store, and shared by runs of the same class noun."""
    prior_kind: PriorKind = "images"
    """Target of the prior term: the class-prior images, as in the paper, or what a frozen copy of the backbone (the
    teacher) predicts for them."""
    prior_steps: Annotated[int | None, _by_backbone("prior_steps")] = None
    """Sampler steps for each class-prior image."""
    prior_guidance: Annotated[float | None, _by_backbone("prior_guidance")] = None
    """Guidance scale of the class-prior images."""
    prior_scheduler: Annotated[str | None, _by_backbone("prior_scheduler", value="CLASS")] = None
    """diffusers scheduler class that draws them; ancestral by default, as in the paper."""
    prior_batch: int | Literal["auto"] = 8
    """Images drawn at once; part of what determines an image, down to rounding. "auto" finds the largest batch for
    this machine's GPU."""
    prior_compile: bool = False
    """Draw with torch.compile: slower to start, faster for each image."""
    prior_workers: Annotated[int | None, shown("as many as the cluster has room for")] = None
    """Processes that draw, each with the resources of a training worker."""


@dataclass(frozen=True)
class _MethodOptions:
    """The method."""

    method: Annotated[str, shown("dreambooth", "|".join(METHODS))] = "dreambooth"
    """dreambooth trains the networks; textual-inversion nothing but the embeddings of the identifier's tokens."""
    method_settings: Annotated[tuple[str, ...], shown("the method's own", "NAME=VALUE ...")] = ()
    """Settings of the method's own."""


@dataclass(frozen=True)
class _OptimizationOptions:
    """Optimization."""

    steps: Annotated[int | None, _by_backbone("steps", "; --preset and other methods have their own")] = None
    """Optimizer steps."""
    learning_rate: Annotated[
        float | None, _by_backbone("learning_rate", "; --train-text-encoder and other methods have their own")
    ] = None
    """Learning rate after the warm-up."""
    text_encoder_learning_rate: Annotated[float | None, shown("--learning-rate")] = None
    """Learning rate of the text encoders, with --train-text-encoder."""
    schedule: Schedule = "constant"
    """Learning rate after the warm-up; cosine and linear fall towards 0."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises from 0."""
    batch: Annotated[int | None, _by_backbone("batch", "; --preset has its own")] = None
    """Photos a step, over all workers; as many class-prior images come on top."""
    gradient_accumulation: int = 1
    """Forward and backward passes for one step; each takes its part of the batch."""
    optimizer: Literal["adamw", "adamw-8bit", "adafactor"] = "adamw"
    """The two with less state need --zero-stage 0 and --precision fp32; adamw-8bit also bitsandbytes and a GPU."""
    weight_decay: float = 1e-2
    """Weight decay of the optimizer."""
    max_grad_norm: float = 1.0
    """Clip the gradient's norm to this; 0 does not clip."""
    min_snr_gamma: Annotated[float | None, shown("all weigh 1")] = None
    """Weight timesteps by min-SNR with this gamma; 5 is usual."""
    offset_noise: float = 0.0
    """Strength of added noise that is one number a channel, for very dark or bright images; 0.05-0.1 is usual."""
    ema_decay: float = 0.0
    """Publish an exponential moving average of the weights with this decay, for example 0.999; 0 publishes the last
    ones."""


@dataclass(frozen=True)
class _PhotoOptions:
    """How the photos are shown."""

    flip: bool = False
    """Mirror half of the views. Leave it off where left and right matter: writing, one-sided markings."""
    random_crop: bool = False
    """Cut photos that are not square at random places, 8 views a photo, instead of in the middle."""
    buckets: bool = False
    """Keep about the photos' own shapes, from 1:2 to 2:1, instead of cutting squares.
    The photos of a step have one shape."""


@dataclass(frozen=True)
class _SpeedOptions:
    """Precision, speed and checkpoints."""

    precision: Annotated[Literal["fp32", "bf16", "fp16"] | None, shown("bf16 on GPUs, fp32 on CPUs")] = None
    """Arithmetic of the networks; bf16 and fp16 keep float32 masters of the weights."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time. Some presets turn it on."""
    compile: bool = False
    """Train with torch.compile: slower to start, faster for each step. Not under --zero-stage 3."""
    checkpoint_every: Annotated[int, shown("100", "STEPS")] = 100
    """Steps between checkpoints, from which a killed run continues."""
    previews: bool = False
    """Draw the sample prompts at each checkpoint, beside the training, if the cluster has a worker to spare."""


@dataclass(frozen=True)
class TrainingOptions(_MethodOptions, _OptimizationOptions, _PhotoOptions, _SpeedOptions):
    """Fine-tuning."""


@dataclass(frozen=True)
class ClusterOptions:
    """Workers and memory."""

    preset: Annotated[Literal["1x24GB", "1x80GB", "8x80GB"] | None, shown("what this machine has")] = None
    """Defaults for GPUs of this number and memory: workers, steps, batch, precision, ZeRO stage, offloading and
    gradient checkpointing. Other options win."""
    workers: Annotated[int | None, shown("those of --preset, or one a local GPU, or 2 on the CPU")] = None
    """Training workers for one subject."""
    gpus_per_worker: Annotated[float | None, shown("1 with --preset or a local GPU, else 0")] = None
    """GPUs of a worker. Give it when the cluster has GPUs and this machine has none."""
    cpus_per_worker: int = 1
    """CPU cores of a worker; on the CPU also its threads."""
    min_workers: Annotated[int | None, shown("--workers")] = None
    """Continue with this many training workers when nodes are lost, and with more when they come back."""
    lanes: Annotated[int | None, shown("as many as the cluster has room for")] = None
    """Groups of workers that train different subjects side by side."""
    zero_stage: Annotated[
        Literal[0, 1, 2, 3] | None, shown("that of --preset, or 2; for one worker in fp32 without offloading 0")
    ] = None
    """DeepSpeed ZeRO: 1 shards optimizer states, 2 gradients too, 3 weights too."""
    offload: Annotated[Literal["none", "cpu", "nvme"] | None, shown("that of --preset, or none")] = None
    """Keep optimizer states (and under stage 3 the weights) in host memory, or under stage 3 on a local disk."""
    nvme_path: Annotated[str | None, shown("", "FOLDER")] = None
    """Folder on every node's own disk, for --offload nvme; its files are of no use after the run."""
    deepspeed: Annotated[str | None, shown("", "FILE")] = None
    """JSON file of further settings in DeepSpeed's own form. It may not set what an option sets."""
    device_memory: Annotated[float | None, shown("this machine's own, or that of --preset", "GIB")] = None
    """GiB of memory of one device, for the plan."""


@dataclass(frozen=True)
class SampleOptions:
    """Samples of the finished model."""

    sample_prompts: Annotated[tuple[str, ...], shown("six of the paper's kind", "PROMPT ...")] = ()
    """Prompts with {subject} for "[V] [class noun]"."""
    sample_steps: Annotated[int | None, _by_backbone("sample_steps")] = None
    """Sampler steps of a sample."""
    sample_guidance: Annotated[float | None, _by_backbone("sample_guidance")] = None
    """Guidance scale of the samples."""


@dataclass(frozen=True)
class RunOptions:
    """The run."""

    store: Annotated[str, shown("~/dreambooth-store", "FOLDER|URI")] = "~/dreambooth-store"
    """Subject store: a folder, or a URI such as s3://bucket/store. Every node of a cluster must reach it."""
    seed: int = 0
    """All noise, timesteps and orders follow from it."""
    config: Annotated[str | None, shown("", "FILE")] = None
    """YAML file of these options (`learning_rate: 5e-6`). The command line wins; --no-NAME turns a flag off."""
    dry_run: bool = False
    """Check all input, print the plan, and stop."""
    verbose: bool = False
    """Show the logs of Ray, DeepSpeed and the workers here too."""


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
    show_help_if_asked(Options, arguments, description, FIRST)
    try:
        from_file = list(_config_arguments(arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return read_arguments(Options, [*from_file, *arguments])


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
        if value is None:  # not given
            continue
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
