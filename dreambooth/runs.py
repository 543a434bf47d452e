"""A run: one subject, its settings and its workers as plain values, which any stage can take to any machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from dreambooth.backbones import Backbone, LowResolution
from dreambooth.common.keys import key_form, later
from dreambooth.common.learning_rate import Schedule
from dreambooth.common.location import digest
from dreambooth.methods import METHODS
from dreambooth.sampling.prior_set import PriorSet
from dreambooth.sampling.sampler import SamplerSettings
from dreambooth.subjects.class_noun import FoundNoun
from dreambooth.subjects.crops import Size, nearest_bucket
from dreambooth.subjects.photos import Subject
from dreambooth.subjects.prompts import class_prompt, instance_prompt

PriorKind = Literal["images", "teacher"]


@dataclass(frozen=True)
class Training:
    """Settings of the fine-tuning that determine its result."""

    method: str
    """The name of one of `dreambooth.methods.METHODS`."""
    trained: tuple[str, ...]
    """Networks that are trained; none by Textual Inversion."""
    resolution: int
    steps: int
    learning_rate: float
    text_encoder_learning_rate: float
    schedule: Schedule
    warmup_steps: int
    batch: int
    gradient_accumulation: int
    prior_weight: float
    prior_images: int
    min_snr_gamma: float | None
    offset_noise: float
    ema_decay: float
    weight_decay: float
    max_grad_norm: float
    optimizer: str
    precision: str
    gradient_checkpointing: bool
    low_resolution: LowResolution | None = None
    """What a super-resolution stage is conditioned on."""
    flip: bool = False
    random_crop: bool = False
    views: int = 1
    """How often each photo was encoded, as flips and crops show it."""
    frames: tuple[Size, ...] = ()
    """The sizes of aspect-ratio buckets; none where all photos are cut square."""
    prior_kind: PriorKind = "images"
    """The target of the prior term: the class-prior images, or the frozen teacher's prediction on them."""
    compile: bool = False
    bare_identifier: bool = False
    """The subject is called [V] alone, without its class noun."""
    method_settings: Any = later(None)
    """The settings of the method's own, an instance of its `settings_kind`."""

    def bucket_of(self, photo: Size) -> Size:
        """The bucket in which a photo of this size is shown."""
        return nearest_bucket(photo, self.frames or [(self.resolution, self.resolution)])

    def trains_text(self, backbone: Backbone) -> bool:
        """Whether the embeddings of prompts change while training."""
        return METHODS[self.method].trains_text(backbone, self.trained)


@dataclass(frozen=True)
class Resources:
    """How many processes work side by side, and what each is given; on the CPU its cores are its threads too."""

    workers: int
    cpus_per_worker: int
    gpus_per_worker: float


@dataclass(frozen=True)
class WorkerGroup(Resources):
    """The worker group that trains, and how ZeRO shards over it. Part of the arithmetic, down to rounding."""

    zero_stage: int
    offload: str
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """DeepSpeed settings of the user's own."""


@dataclass(frozen=True)
class Upscaling:
    """A last stage that enlarges the samples of a cascade and is not trained."""

    backbone: str
    """The hash of the upscaler."""
    samples: SamplerSettings
    noise_level: int


@dataclass(frozen=True)
class RunSpec:
    """One subject to be personalized: a pure value, from which every stage can be run alone, anywhere."""

    subject: str
    class_noun: str
    identifier: str
    token_ids: tuple[int, ...]
    images: tuple[tuple[str, str], ...]
    """(name, SHA-256) of each instance image."""
    backbone: str
    """The backbone's hash."""
    training: Training
    lane: WorkerGroup
    prior: PriorSet | None
    samples: SamplerSettings
    sample_prompts: tuple[str, ...]
    seed: int
    super_resolution: RunSpec | None = None
    """The same subject on the backbone that enlarges this one's images, when a cascade is trained."""
    captions: tuple[str, ...] = ()
    """The prompt of each instance image; without captions all carry the instance prompt."""
    upscaling: Upscaling | None = None

    @cached_property
    def key(self) -> str:
        """The content address of the run; the version that it publishes bears its first 12 digits."""
        return digest(key_form(self), 32)

    @property
    def version(self) -> str:
        """The id of the version."""
        return self.key[:12]

    @property
    def cascade(self) -> tuple[RunSpec, ...]:
        """The stages of the cascade in the order in which they draw: this run, and its super-resolution."""
        return (self,) if self.super_resolution is None else (self, self.super_resolution)

    @property
    def draws_alone(self) -> bool:
        """Whether the stage draws from text alone, and does not enlarge what another has drawn."""
        return self.training.low_resolution is None

    @property
    def phrase(self) -> str:
        """What the subject is called in prompts: [V] [class noun], or by Textual Inversion [V]."""
        return subject_phrase(self.training, self.identifier, self.class_noun)

    @property
    def instance_prompt(self) -> str:
        """a [V] [class noun]."""
        return instance_prompt(self.phrase)

    @property
    def class_prompt(self) -> str:
        """a [class noun]."""
        return class_prompt(self.class_noun)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompt of each instance image."""
        return self.captions or (self.instance_prompt,) * len(self.images)

    def as_dict(self) -> dict[str, Any]:
        """A JSON-like form."""
        return asdict(self)


def subject_phrase(training: Training, identifier: str, class_noun: str) -> str:
    """What a subject is called in prompts."""
    bare = training.bare_identifier or METHODS[training.method].bare_identifier
    return identifier if bare else f"{identifier} {class_noun}"


@dataclass(frozen=True)
class PlannedSubject:
    """A subject with its images read, and its run."""

    subject: Subject
    run: RunSpec
    found_noun: FoundNoun | None = None
    """Where the class noun comes from when nobody gave one."""

    @property
    def cascade(self) -> tuple[PlannedSubject, ...]:
        """The subject with each stage of its run's cascade."""
        return tuple(replace(self, run=run) for run in self.run.cascade)
