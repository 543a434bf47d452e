"""The engine: every precision and optimizer can be stopped and gone on with as if it had never been stopped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import AsyncIOBuilder
from torch import Tensor

from pipelines.engine.engine import LOSS_SCALER, restore
from tests.pipelines.engines import RATE, Learner, lane, parameters_of, process_group, training


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with process_group(tmp_path_factory.mktemp("world")):
        yield


@pytest.fixture(autouse=True)
def fp16_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let DeepSpeed try fp16 here: torch can do it on CPUs, slowly, and users are refused it."""
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


ENGINES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fp32": ({}, {"zero_stage": 0}),
    "fp32, ZeRO 2": ({}, {"zero_stage": 2}),
    "bf16, ZeRO 3": ({"precision": "bf16"}, {"zero_stage": 3}),
    "fp16, ZeRO 1": ({"precision": "fp16"}, {"zero_stage": 1}),
    "fp16, ZeRO 2": ({"precision": "fp16"}, {"zero_stage": 2}),
    "fp16, ZeRO 3": ({"precision": "fp16"}, {"zero_stage": 3}),
    "fp16, accumulated": ({"precision": "fp16", "gradient_accumulation": 2}, {"zero_stage": 2}),
    "fp16, offloaded": ({"precision": "fp16"}, {"zero_stage": 2, "offload": "cpu"}),
    "adafactor": ({"optimizer": "adafactor"}, {"zero_stage": 0}),
    "adamw-8bit": ({"optimizer": "adamw-8bit"}, {"zero_stage": 0}),
}


@pytest.mark.parametrize("name", ENGINES)
def test_going_on_from_a_checkpoint_is_never_having_stopped(name: str) -> None:
    if name == "adamw-8bit":
        pytest.importorskip("bitsandbytes", reason="an extra, see pyproject.toml; its 8-bit AdamW runs on CPUs too")
    settings = training(**ENGINES[name][0]), lane(**ENGINES[name][1])
    whole = Learner(*settings)
    # Gradients of this size overflow fp16 until their scale has fallen.
    losses = whole.learn(range(4), scale=1e3)
    stopped = whole.state()
    losses += whole.learn(range(4, 8), scale=1e3)

    resumed = Learner(*settings, parameters_of(stopped))
    restore(resumed.engine, stopped, step=4)
    assert differing(stopped, resumed.state()) == []
    assert resumed.learn(range(4, 8), scale=1e3) == losses[4:]
    assert differing(whole.state(), resumed.state()) == []
    assert losses[-1] < losses[0]


@pytest.mark.slow  # compiles DeepSpeed's asynchronous I/O once
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_on_a_disk_trains_and_goes_on_as_if_it_were_in_memory(precision: str, tmp_path: Path) -> None:
    if not AsyncIOBuilder().is_compatible():
        pytest.skip("libaio's headers are absent: apt-get install libaio-dev")
    settings, place = training(precision=precision), lane(zero_stage=3, offload="nvme")
    width = 60_000  # so that a megabyte is there to be written, less than which DeepSpeed keeps in memory
    disks = [tmp_path / name for name in ("whole", "resumed")]
    for disk in disks:
        disk.mkdir()
    in_memory = Learner(settings, lane(zero_stage=3), width=width)
    whole = Learner(settings, place, width=width, disk=disks[0])
    losses = whole.learn(range(2))
    assert losses == pytest.approx(in_memory.learn(range(2)), rel=1e-5)
    assert list(disks[0].rglob("exp_avg_sq*.swp"))
    stopped = whole.state()
    for name, value in in_memory.state().items():
        # Adam's first steps have size lr whatever the gradient, so rounding in near-zero gradients shows up.
        torch.testing.assert_close(stopped[name], value, rtol=1e-3, atol=RATE / 100)

    losses = whole.learn(range(2, 4))
    resumed = Learner(settings, place, parameters_of(stopped), width, disks[1])
    restore(resumed.engine, stopped, step=2)
    assert differing(stopped, resumed.state()) == []
    assert resumed.learn(range(2, 4)) == losses
    assert differing(whole.state(), resumed.state()) == []


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_an_overflow_costs_no_update(zero_stage: int) -> None:
    exact = Learner(training(), lane(zero_stage=0))
    exact.learn(range(6))
    rounded = Learner(training(precision="fp16"), lane(zero_stage=zero_stage))
    rounded.learn(range(6), scale=1e3)  # clipping takes the scale away again
    assert rounded.overflows > 0
    before = parameters_of(Learner(training(), lane(zero_stage=0)).state())
    moved, wanted = (
        torch.cat([(parameters_of(one.state())[name] - before[name]).flatten() for name in before])
        for one in (rounded, exact)
    )
    assert torch.cosine_similarity(moved, wanted, dim=0) > 0.95
    assert moved.norm().item() == pytest.approx(wanted.norm().item(), rel=0.05)


def test_the_loss_scale_is_in_the_checkpoint() -> None:
    learner = Learner(training(precision="fp16"), lane())
    learner.learn(range(3), scale=1e3)
    scale, tries, *_ = learner.state()[LOSS_SCALER].tolist()
    assert scale == 2.0 ** (16 - learner.overflows)
    assert tries == 3 + learner.overflows


def test_gradients_that_no_scale_can_hold_end_the_training() -> None:
    learner = Learner(training(precision="fp16"), lane())
    with pytest.raises(ArithmeticError, match="--precision bf16"):
        learner.learn(range(1), scale=float("inf"))


def test_gradients_of_several_passes_are_summed_up_in_float32() -> None:
    # What the memory plan counts on: DeepSpeed's own buffer of this rank's gradients under ZeRO 3.
    once, twice = (Learner(training(precision="bf16", gradient_accumulation=n), lane(zero_stage=3)) for n in (1, 2))
    buffers = [learner.engine.optimizer.grad_partitions_flat_buffer for learner in (once, twice)]
    assert [buffer.dtype for buffer in buffers] == [torch.bfloat16, torch.float32]


def test_adafactor_keeps_its_second_moment_by_rows_and_columns() -> None:
    learner = Learner(training(optimizer="adafactor"), lane(zero_stage=0))
    learner.learn(range(1))
    shapes = {name: tuple(value.shape) for name, value in learner.state().items() if name.endswith("0.weight")}
    assert shapes == {"param.0.weight": (96, 8), "exp_avg_sq_row.0.weight": (96,), "exp_avg_sq_col.0.weight": (8,)}
