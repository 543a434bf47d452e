"""The skeleton takes on subjects exactly, and the host tier keeps to its budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dreambooth.backbones import open_backbone
from dreambooth.store import SubjectStore, Version
from serve.replica import HostTier, Skeleton
from tests.serve.published import publish_all


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SubjectStore:
    return SubjectStore(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def versions(store: SubjectStore, small_sdxl: Path) -> list[Version]:
    return publish_all(store, small_sdxl)


@pytest.fixture
def skeleton(small_sdxl: Path) -> Skeleton:
    return Skeleton(open_backbone(small_sdxl), torch.float32, torch.device("cpu"))


def test_the_skeleton_holds_one_subject_and_is_never_rebuilt(
    skeleton: Skeleton, store: SubjectStore, versions: list[Version]
) -> None:
    host = HostTier(store, torch.float32, 2**30)
    live = {
        f"{component}.{name}": tensor
        for component in ("unet", "text_encoder", "text_encoder_2", "vae")
        for name, tensor in getattr(skeleton.pipeline, component).state_dict().items()
    }
    base = {name: tensor.clone() for name, tensor in live.items()}
    for version in [*versions, *reversed(versions)]:
        expected = base | dict(host.tensors(version))
        skeleton.wear(version.id, host.tensors(version))
        assert [name for name in live if not torch.equal(live[name], expected[name])] == []


def test_a_subject_that_does_not_fit_changes_nothing(skeleton: Skeleton) -> None:
    bias = skeleton.pipeline.unet.conv_in.bias
    before = bias.clone()
    for tensors in ({"unet.conv_in.bias": torch.zeros(1)}, {"unet.unknown": torch.zeros(1)}):
        with pytest.raises(AssertionError, match="broken@1"):
            skeleton.wear("broken@1", tensors)
    assert torch.equal(bias, before)


def test_the_host_tier_drops_the_least_recently_used(store: SubjectStore, versions: list[Version]) -> None:
    old_mug, mug, dog = versions
    size = sum(tensor.nbytes for tensor in HostTier(store, torch.float32, 0).tensors(mug).values())
    host = HostTier(store, torch.float32, 2 * size)
    kept, dropped = host.tensors(old_mug), host.tensors(mug)
    assert host.tensors(old_mug) is kept
    host.tensors(dog)
    assert host.tensors(old_mug) is kept
    assert host.tensors(mug) is not dropped


def test_the_host_tier_keeps_a_subject_larger_than_its_budget(store: SubjectStore, versions: list[Version]) -> None:
    host = HostTier(store, torch.float32, 0)
    assert host.tensors(versions[0]) is host.tensors(versions[0])
