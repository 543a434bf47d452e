"""Base weights: read by one rank a host, right on all of them, and under ZeRO 3 never whole where they are trained."""

from __future__ import annotations

import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import pipelines.training.setup
from dreambooth.backbones import Backbone
from dreambooth.runs import RunSpec
from dreambooth.store import SubjectStore
from pipelines.engine.engine import Partition, full_state
from pipelines.training.checkpoints import final_checkpoint
from pipelines.training.host_tensors import Host, HostTensors
from pipelines.training.setup import build_engine, read_base
from pipelines.training.trainer import Worker
from pipelines.training.training_set import location_of
from tests.pipelines.engines import process_group
from tests.pipelines.matrix import Case, prepare
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def prepared(photos: Path, small_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunSpec]:
    """A store, and a run of two workers whose training set is in it."""
    store = tmp_path_factory.mktemp("start") / "store"
    case = Case("sdxl", prior=True, with_text=False, batch=2, zero_stage=3)
    return store, prepare(case, small_sdxl, photos, store)


@pytest.fixture(scope="module")
def stores(prepared: tuple[Path, RunSpec]) -> list[Path]:
    """The store as two ranks see it: to the second its backbone has configurations alone, and no weights to read."""
    store, _ = prepared
    copy = store.with_name("without-weights")
    shutil.copytree(store / "backbones", copy / "backbones")
    for path in (copy / "backbones").rglob("*.safetensors"):
        path.write_bytes(b"")
    for name in ("runs", "priors"):
        (copy / name).symlink_to(store / name)
    return [store, copy]


# -- which rank reads --------------------------------------------------------------------------------------------------


def on_two_hosts(rank: int, folder: Path) -> None:
    """Ranks 0 and 2 are on one host, rank 1 is on another."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'group'}", rank=rank, world_size=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: ("one", "other", "one")[rank])
        read = []

        def read_own() -> dict[str, Tensor]:
            read.append(rank)
            return {"a": torch.full((2, 3), 1.0 + rank).T, "b": torch.tensor(rank, dtype=torch.int64)}

        tensors = HostTensors(Host(), read_own)
        leader = (0, 1, 0)[rank]
        assert read == ([rank] if rank == leader else [])
        assert (list(tensors), len(tensors), "b" in tensors, "c" in tensors) == (["a", "b"], 2, True, False)
        assert torch.equal(tensors["a"], torch.full((3, 2), 1.0 + leader))
        assert tensors["b"].item() == leader


def test_one_rank_of_each_host_reads_and_the_others_are_given(tmp_path: Path) -> None:
    run_ranks(on_two_hosts, (tmp_path,), 3)


# -- what they start with ----------------------------------------------------------------------------------------------

WAYS: list[tuple[dict[str, Any], int]] = [
    ({"prior_kind": "teacher", "precision": "bf16", "trained": ("unet", "text_encoder", "text_encoder_2")}, 3),
    ({"prior_kind": "teacher"}, 2),
]


class Watched(HostTensors):
    """Sees to it that nothing that came before is whole when a tensor is asked for to be partitioned."""

    whole: list[nn.Parameter]

    def __getitem__(self, name: str) -> Tensor:
        assert all(parameter.numel() == 0 for parameter in self.whole)
        return super().__getitem__(name)


def started(rank: int, folder: Path, stores: list[Path], run: RunSpec) -> None:
    """One rank of two on one host; only the first has weights to read."""
    torch.set_num_threads(1)
    backbone = SubjectStore(stores[rank]).open_backbone(run.backbone)
    whole = SubjectStore(stores[0]).open_backbone(run.backbone)
    partitioned: list[nn.Parameter] = []

    class Recorded(Partition):
        def __call__(self, parameter: nn.Parameter) -> None:
            super().__call__(parameter)
            partitioned.append(parameter)

    with process_group(folder, rank, world=2), pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines.training.setup, "Partition", Recorded)
        for training, zero_stage in WAYS:
            changed = replace(run.training, **training)
            one = replace(run, training=changed, lane=replace(run.lane, zero_stage=zero_stage))
            base = Watched(Host(), lambda one=one: read_base(one, backbone))  # type: ignore[misc]
            base.whole = partitioned
            engine, _, teacher = build_engine(one, backbone, base, {}, 0, "")
            trained = list(engine.module.parameters()) if zero_stage == 3 else []
            assert all(kept is parameter for kept, parameter in zip(partitioned, trained, strict=True))
            assert all(parameter.ds_tensor.numel() <= parameter.ds_numel // 2 + 1 for parameter in partitioned)
            state = {name: value.clone() for name, value in full_state(engine, with_moments=False)}
            expected = {
                f"param.networks.{component}.{name}": value.detach()
                for component in one.training.trained
                for name, value in whole.load(component).named_parameters()
            }
            assert state.keys() == expected.keys()
            assert [name for name in expected if not torch.equal(state[name], expected[name])] == []
            assert teacher is not None
            for frozen, value in zip(teacher._denoiser.parameters(), whole.load("unet").parameters(), strict=True):
                assert not hasattr(frozen, "ds_id")
                assert torch.equal(frozen, value.to(frozen.dtype))
            engine.destroy()
            partitioned.clear()


def test_ranks_that_read_nothing_start_with_the_base_weights(
    prepared: tuple[Path, RunSpec], stores: list[Path], tmp_path: Path
) -> None:
    run_ranks(started, (tmp_path, stores, prepared[1]), 2)


# -- a lane ------------------------------------------------------------------------------------------------------------


def a_lane(rank: int, folder: Path, stores: list[Path], runs: list[RunSpec]) -> None:
    """Two ranks train runs one after another."""
    torch.set_num_threads(1)
    loaded: list[str] = []
    load = Backbone.load

    def counted(self: Backbone, component: str, *more: Any) -> Any:
        loaded.append(component)
        return load(self, component, *more)

    with process_group(folder, rank, world=2), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Backbone, "load", counted)
        worker = Worker(SubjectStore(stores[rank]), 2, lambda *_: None)
        for number, run in enumerate(runs):
            worker.train(number, run)
        dist.barrier()
        assert loaded == (["unet"] if rank == 0 else [])


def test_a_lane_reads_each_network_once_for_all_its_ranks_and_runs(
    prepared: tuple[Path, RunSpec], stores: list[Path], tmp_path: Path
) -> None:
    store, base = SubjectStore(prepared[0]), prepared[1]
    lane = replace(base.lane, zero_stage=2)
    runs = [
        replace(base, training=replace(base.training, steps=1, prior_kind=kind), lane=lane)
        for kind in ("teacher", "images")
    ]
    for run in runs:
        location_of(store, run).write_bytes(location_of(store, base).read_bytes())
    run_ranks(a_lane, (tmp_path, stores, runs), 2)
    first, second = (found.read() for run in runs if (found := final_checkpoint(store, run)) is not None)
    assert any(not torch.equal(first[name], second[name]) for name in first)
