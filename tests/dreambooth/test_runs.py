"""A run's key: the ids of published versions, which no change of the code may move."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import pytest

from dreambooth.runs import RunSpec, Training, WorkerGroup
from dreambooth.sampling.prior_set import PriorSet
from dreambooth.sampling.sampler import SamplerSettings

TRAINING = Training(
    method="dreambooth",
    trained=("unet",),
    resolution=512,
    steps=800,
    learning_rate=5e-6,
    text_encoder_learning_rate=0.0,
    schedule="constant",
    warmup_steps=0,
    batch=2,
    gradient_accumulation=1,
    prior_weight=1.0,
    prior_images=200,
    min_snr_gamma=None,
    offset_noise=0.0,
    ema_decay=0.0,
    weight_decay=1e-2,
    max_grad_norm=1.0,
    optimizer="adamw",
    precision="bf16",
    gradient_checkpointing=False,
)
SAMPLES = SamplerSettings(resolution=512, steps=50, guidance=7.5, batch=1, threads=1, precision="bf16")
PRIOR = PriorSet("b" * 64, "a dog", replace(SAMPLES, batch=8, scheduler="EulerAncestralDiscreteScheduler"), 0)
RUN = RunSpec(
    subject="rex",
    class_noun="dog",
    identifier="sks",
    token_ids=(48136,),
    images=(("1.jpg", "1" * 64), ("2.jpg", "2" * 64)),
    backbone="b" * 64,
    training=TRAINING,
    lane=WorkerGroup(1, 1, 1.0, 2, "none"),
    prior=PRIOR,
    samples=SAMPLES,
    sample_prompts=("a sks dog on the beach",),
    seed=0,
)


def inverted(run: RunSpec) -> RunSpec:
    training = replace(TRAINING, method="textual-inversion", trained=(), prior_weight=0.0, prior_images=0)
    return replace(run, training=training, prior=None)


def test_keys_are_those_under_which_versions_and_class_images_lie_in_stores() -> None:
    # A new setting that moves these must be made by `later`; these values never change.
    assert RUN.key == "770fe569e22f5c7b6484a2d9fb04f46c"
    assert inverted(RUN).key == "49c45e5b03c45ad8b4ef99d4a9fd55b0"
    assert PRIOR.key == "6346f40463b32ec3e85b6ddd27c32b3a"


def another(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return value + 1
    return f"{value}x" if isinstance(value, str) else (*value, "x")


@pytest.mark.parametrize("name", [one.name for one in fields(Training) if one.name != "method"])
def test_every_setting_of_training_has_a_part_in_the_key(name: str) -> None:
    changed = replace(TRAINING, **{name: another(getattr(TRAINING, name))})
    assert replace(RUN, training=changed).key != RUN.key


def test_a_methods_own_settings_have_a_part_in_the_key() -> None:
    @dataclass(frozen=True)
    class Own:
        rank: int = 4

    keys = {replace(RUN, training=replace(TRAINING, method_settings=own)).key for own in (None, Own(), Own(8))}
    assert len(keys) == 3
    assert RUN.key in keys


def test_the_subject_is_called_by_its_identifier_alone_where_the_method_says_so() -> None:
    assert RUN.phrase == "sks dog"
    assert replace(RUN, training=replace(TRAINING, bare_identifier=True)).phrase == "sks"
    assert inverted(RUN).phrase == "sks"


def test_a_cascade_is_the_run_and_its_super_resolution() -> None:
    second = replace(RUN, backbone="c" * 64)
    assert RUN.cascade == (RUN,)
    assert replace(RUN, super_resolution=second).cascade == (replace(RUN, super_resolution=second), second)
