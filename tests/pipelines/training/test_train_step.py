"""Two forward passes before one backward pass: under every sharding the weights of a plain loop of AdamW."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dreambooth.methods.dreambooth import DreamBooth, Trainable
from dreambooth.methods.teacher import Teacher
from dreambooth.runs import RunSpec
from dreambooth.store import SubjectStore
from pipelines.planning.options import parse
from pipelines.planning.plan import make_plan
from pipelines.runtime.console import Display
from pipelines.stages.encode import TrainingSetEncoder
from pipelines.stages.finetune import finetune
from pipelines.training.batches import Batches
from pipelines.training.checkpoints import final_checkpoint
from pipelines.training.train_step import step_loss
from pipelines.training.training_set import location_of
from tests.prior_sets import undisturbed

pytestmark = pytest.mark.usefixtures("local_ray")

State = dict[str, Tensor]


class Engine(Trainable):
    """The module, called as DeepSpeed's engine is."""

    device = torch.device("cpu")


@pytest.fixture(scope="module")
def prepared(photos: Path, small_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SubjectStore, RunSpec]:
    """A run with buckets and a teacher, whose class-prior images and training set are in the store."""
    arguments = ["--images", str(photos), "--class-noun", "mug", "--backbone", str(small_sdxl), "--steps", "4"]
    arguments += ["--store", str(tmp_path_factory.mktemp("passes")), "--prior-images", "4", "--prior-batch", "4"]
    arguments += ["--prior-steps", "3", "--batch", "2", "--learning-rate", "1e-3", "--max-grad-norm", "0"]
    plan = make_plan(parse([*arguments, "--buckets", "--prior-kind", "teacher", "--train-text-encoder"], ""))
    [planned] = plan.subjects
    assert planned.run.prior is not None
    plan.store.add_backbone(plan.backbone)
    undisturbed(plan.store, [planned.run.prior], 4)
    TrainingSetEncoder(plan.store.root.uri)({"planned": pickle.dumps(planned)})
    return plan.store, planned.run


@pytest.fixture(scope="module")
def plain_loop(prepared: tuple[SubjectStore, RunSpec]) -> tuple[State, State]:
    """The parameters before and after the run's steps, by torch alone."""
    store, run = prepared
    backbone = store.open_backbone(run.backbone)
    module = Engine(backbone, {name: backbone.load(name) for name in run.training.trained})
    before = {f"param.{name}": value.detach().clone() for name, value in module.named_parameters()}
    parameters = DreamBooth().parameter_groups(
        backbone, module, run.training.learning_rate, run.training.text_encoder_learning_rate
    )
    optimizer = torch.optim.AdamW(parameters, weight_decay=run.training.weight_decay)
    teacher = Teacher(backbone, backbone.load("unet"))
    path = location_of(store, run).local
    assert path is not None
    batches = Batches(run, backbone, path)
    shapes = set()
    for step in range(run.training.steps):
        rows = batches.rows(step, range(run.training.batch))
        shapes.add(rows[0].x.shape)
        step_loss(module, run, backbone, rows, teacher).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(shapes) == 3
    return before, {f"param.{name}": value.detach() for name, value in module.named_parameters()}


@pytest.mark.parametrize(
    ("zero_stage", "workers", "more"),
    [
        (3, 1, {}),
        pytest.param(3, 2, {}, marks=pytest.mark.slow),
        pytest.param(2, 2, {}, marks=pytest.mark.slow),
        pytest.param(2, 1, {}, marks=pytest.mark.slow),
        pytest.param(2, 2, {"gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param(3, 2, {"gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param(3, 1, {"gradient_accumulation": 2}, marks=pytest.mark.slow),
    ],
)
def test_halves_of_two_shapes_train_as_in_a_plain_loop(
    prepared: tuple[SubjectStore, RunSpec],
    plain_loop: tuple[State, State],
    zero_stage: int,
    workers: int,
    more: dict[str, Any],
) -> None:
    store, base = prepared
    lane = replace(base.lane, zero_stage=zero_stage, workers=workers)
    run = replace(base, training=replace(base.training, **more), lane=lane)
    location_of(store, run).write_bytes(location_of(store, base).read_bytes())
    assert finetune(store, [run], checkpoint_every=3, display=Display()) == {}
    checkpoint = final_checkpoint(store, run)
    assert checkpoint is not None
    trained = checkpoint.read()
    before, after = plain_loop
    assert trained.keys() == after.keys()
    # Adam's first steps have size lr whatever the gradient: rounding in near-zero gradients shows up to this size.
    moved = torch.cat([(trained[name] - before[name]).flatten() for name in after])
    expected = torch.cat([(after[name] - before[name]).flatten() for name in after])
    assert expected.abs().max() > 3e-3
    assert torch.cosine_similarity(moved, expected, dim=0) > 0.9999
    assert (moved - expected).abs().max() < 5e-4
