"""Fine-tuning: the same weights whatever the sharding, the number of workers, and interruptions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from dreambooth.methods.dreambooth import DreamBooth, Trainable
from dreambooth.runs import RunSpec
from dreambooth.store import SubjectStore
from pipelines.planning.options import parse
from pipelines.planning.plan import make_plan
from pipelines.runtime.console import Display
from pipelines.stages.encode import encode_training_sets
from pipelines.stages.finetune import finetune
from pipelines.stages.priors import generate_priors
from pipelines.training.batches import Batches, joined
from pipelines.training.checkpoints import final_checkpoint
from pipelines.training.training_set import location_of

pytestmark = pytest.mark.usefixtures("local_ray")

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def prepared(
    local_ray: None, photos: Path, small_sdxl: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SubjectStore, RunSpec]:
    """A run on a small SDXL, whose class-prior images and training set are in the store."""
    arguments = ["--images", str(photos), "--class-noun", "mug", "--backbone", str(small_sdxl), "--steps", "4"]
    arguments += ["--store", str(tmp_path_factory.mktemp("finetune")), "--prior-images", "4", "--prior-batch", "4"]
    arguments += ["--prior-steps", "3", "--batch", "4", "--learning-rate", "1e-3", "--workers", "2"]
    plan = make_plan(parse(arguments, ""))
    [planned] = plan.subjects
    assert planned.run.prior is not None
    plan.store.add_backbone(plan.backbone)
    generate_priors(plan.store, [(planned.run.prior, 4)], planned.run.lane, Display())
    encode_training_sets(plan.store, [planned], planned.run.lane, Display())
    return plan.store, planned.run


@pytest.fixture(scope="module")
def train(prepared: tuple[SubjectStore, RunSpec]) -> Callable[..., State]:
    """Trains a variant of the prepared run, once; gives the final float32 parameters."""
    store, base = prepared
    trained: dict[str, State] = {}

    def train(training: dict[str, Any] | None = None, **lane: Any) -> State:
        run = replace(base, training=replace(base.training, **(training or {})), lane=replace(base.lane, **lane))
        if run.key not in trained:
            location_of(store, run).write_bytes(location_of(store, base).read_bytes())
            assert finetune(store, [run], checkpoint_every=3, display=Display()) == {}
            checkpoint = final_checkpoint(store, run)
            assert checkpoint is not None
            trained[run.key] = checkpoint.read()
        return trained[run.key]

    return train


def base_parameters(prepared: tuple[SubjectStore, RunSpec]) -> State:
    store, run = prepared
    module = store.open_backbone(run.backbone).load("unet")
    return {f"param.networks.unet.{name}": value.detach() for name, value in module.named_parameters()}


def largest_difference(a: State, b: State) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def test_every_parameter_moves(train: Callable[..., State], prepared: tuple[SubjectStore, RunSpec]) -> None:
    before, after = base_parameters(prepared), train(zero_stage=2)
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_zero_stages_publish_the_same_weights(train: Callable[..., State], zero_stage: int) -> None:
    # Adam's first steps have size lr whatever the gradient, so rounding in near-zero gradients shows up to this size.
    assert largest_difference(train(zero_stage=zero_stage), train(zero_stage=2)) < 2e-4


@pytest.mark.slow
def test_one_worker_and_two_with_the_same_global_batch_publish_the_same_weights(train: Callable[..., State]) -> None:
    assert largest_difference(train(zero_stage=2, workers=1), train(zero_stage=2)) < 2e-4


@pytest.mark.slow
def test_gradient_accumulation_publishes_the_same_weights(train: Callable[..., State]) -> None:
    accumulated = train({"gradient_accumulation": 2}, zero_stage=2)
    assert largest_difference(accumulated, train(zero_stage=2)) < 2e-4


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bf16_moves_the_masters_as_fp32_does(
    train: Callable[..., State], prepared: tuple[SubjectStore, RunSpec], zero_stage: int
) -> None:
    before, exact = base_parameters(prepared), train(zero_stage=2)
    rounded = train({"precision": "bf16"}, zero_stage=zero_stage)
    moved = torch.cat([(exact[name] - before[name]).flatten() for name in before])
    moved_in_bf16 = torch.cat([(rounded[name] - before[name]).flatten() for name in before])
    assert torch.cosine_similarity(moved, moved_in_bf16, dim=0) > 0.9
    assert (moved_in_bf16 == 0).float().mean() < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_offloading_to_the_host_publishes_the_same_weights(train: Callable[..., State], zero_stage: int) -> None:
    assert largest_difference(train(zero_stage=zero_stage, offload="cpu"), train(zero_stage=2)) < 2e-4


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_the_moving_average_of_the_weights_is_published(
    train: Callable[..., State], prepared: tuple[SubjectStore, RunSpec], zero_stage: int
) -> None:
    before, after = base_parameters(prepared), train({"steps": 1}, zero_stage=2)
    # After the first update the average has taken in 9 / 11 of the way from the base.
    expected = {name: torch.lerp(before[name], after[name], 9 / 11) for name in before}
    average = train({"steps": 1, "ema_decay": 0.999}, zero_stage=zero_stage)
    assert largest_difference(average, expected) < (1e-6 if zero_stage == 2 else 2e-4)
    assert largest_difference(average, after) > 1e-4


def test_a_lane_trains_runs_one_after_another_as_if_each_were_alone(
    train: Callable[..., State], prepared: tuple[SubjectStore, RunSpec]
) -> None:
    store, base = prepared
    expected = [train(zero_stage=2), train({"learning_rate": 2e-3})]
    others = [{}, {"learning_rate": 1e30}, {"learning_rate": 2e-3}]
    # Other samples of the finished model make them runs of their own; what is trained is the same.
    runs = [replace(base, training=replace(base.training, **other), sample_prompts=("in a lane",)) for other in others]
    for run in runs:
        location_of(store, run).write_bytes(location_of(store, base).read_bytes())
    untrained = finetune(store, runs, checkpoint_every=3, display=Display(), lanes=1)
    assert untrained.keys() == {runs[1].key}
    assert "is not finite at step" in untrained[runs[1].key]
    for run, alone in zip([runs[0], runs[2]], expected, strict=True):
        checkpoint = final_checkpoint(store, run)
        assert checkpoint is not None
        trained = checkpoint.read()
        assert [name for name in alone if not torch.equal(trained[name], alone[name])] == []


@pytest.mark.slow
def test_previews_are_drawn_beside_the_training(prepared: tuple[SubjectStore, RunSpec]) -> None:
    store, base = prepared
    run = replace(base, training=replace(base.training, steps=400), lane=replace(base.lane, workers=1))
    location_of(store, run).write_bytes(location_of(store, base).read_bytes())
    finetune(store, [run], checkpoint_every=50, display=Display(), previews=True)
    folder = (store.root / "runs" / run.key / "previews").local
    assert folder is not None
    drawn = sorted(folder.glob("*.png"))
    assert drawn
    assert all(int(path.stem) % 50 == 0 for path in drawn)
    assert len({path.read_bytes() for path in drawn}) == len(drawn)
    events = EventAccumulator(str(folder.parent / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [image.step for image in events.Images("samples")] == [int(path.stem) for path in drawn]


def test_text_encoders_have_a_learning_rate_of_their_own(prepared: tuple[SubjectStore, RunSpec]) -> None:
    store, run = prepared
    backbone = store.open_backbone(run.backbone)
    training = replace(run.training, trained=("unet", "text_encoder"), text_encoder_learning_rate=1e-7)
    module = Trainable(backbone, {name: backbone.load(name) for name in training.trained})
    unet, text = DreamBooth().parameter_groups(
        backbone, module, training.learning_rate, training.text_encoder_learning_rate
    )
    assert (unet["initial_lr"], text["initial_lr"]) == (run.training.learning_rate, 1e-7)
    assert {id(p) for p in text["params"]} == {id(p) for p in module.networks["text_encoder"].parameters()}
    assert len(unet["params"]) + len(text["params"]) == len(list(module.parameters()))


def test_offset_noise_moves_each_channel_by_one_number(prepared: tuple[SubjectStore, RunSpec]) -> None:
    store, run = prepared
    path = location_of(store, run).local
    assert path is not None
    backbone = store.open_backbone(run.backbone)
    offset = replace(run, training=replace(run.training, offset_noise=0.1))
    plain, moved = (joined(Batches(one, backbone, path).rows(5, range(3))).epsilon for one in (run, offset))
    difference = moved - plain
    per_channel = difference.mean((2, 3))
    assert (difference - per_channel[:, :, None, None]).abs().max() < 1e-6
    assert 0.03 < per_channel.std() < 0.3
