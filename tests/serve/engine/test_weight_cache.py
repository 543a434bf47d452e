"""The caches read each version once, keep to their budgets, and never evict what is in use."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dreambooth.backbones import open_backbone
from dreambooth.common.location import Location
from dreambooth.store import SubjectStore, Version
from serve.engine import weight_cache
from serve.engine.swap_pipeline import SwapPipeline
from serve.engine.weight_cache import DiskCache, HostCache
from tests.serve.published import DOG, MUG, OLD_MUG, publish_all

pytestmark = pytest.mark.anyio


class WatchedDisk(DiskCache):
    """A disk cache that records what is read, and blocks reads while `gate` is closed."""

    def __init__(self, store: SubjectStore, folder: Path, budget: int) -> None:
        super().__init__(store, folder, budget)
        self.read: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    @contextlib.contextmanager
    def files(self, published: Version) -> Iterator[Path]:
        self.read.append(published.id)
        assert self.gate.wait(10)
        with super().files(published) as folder:
            yield folder


@pytest.fixture(scope="module")
def base(small_sdxl: Path) -> dict[str, Tensor]:
    return dict(SwapPipeline(open_backbone(small_sdxl), torch.float32, torch.device("cpu")).base)


@pytest.fixture
def disk(store: SubjectStore, versions: list[Version], tmp_path: Path) -> WatchedDisk:
    return WatchedDisk(store, tmp_path, 2**30)


async def use(host: HostCache, key: tuple[str, str]) -> dict[str, Tensor]:
    async with host.lease(*key) as tensors:
        return dict(tensors)


async def size_of(disk: WatchedDisk, base: dict[str, Tensor], key: tuple[str, str]) -> int:
    host = HostCache(disk, base, 2**30)
    await use(host, key)
    disk.read.clear()
    return host.bytes


async def test_a_version_asked_for_by_many_is_read_once(disk: WatchedDisk, base: dict[str, Tensor]) -> None:
    host = HostCache(disk, base, 2**30)
    disk.gate.clear()
    waiting = [asyncio.create_task(use(host, key)) for key in (MUG, DOG, MUG, DOG, MUG)]
    while len(disk.read) < 2:
        await asyncio.sleep(0.01)  # both are being read at one time: neither has passed the gate
    disk.gate.set()
    first, *others = await asyncio.gather(*waiting)
    assert sorted(disk.read) == sorted([MUG[1], DOG[1]])
    assert all(others[1][name] is tensor for name, tensor in first.items())


async def test_only_tensors_that_differ_from_the_backbone_are_kept(
    store: SubjectStore, disk: WatchedDisk, base: dict[str, Tensor]
) -> None:
    host = HostCache(disk, base, 2**30)
    whole = await use(host, DOG)
    assert whole
    assert all(name.startswith("text_encoder.") and not torch.equal(whole[name], base[name]) for name in whole)
    changed = next(iter(whole))
    almost = HostCache(disk, base | {name: whole[name] for name in whole if name != changed}, 2**30)
    assert list(await use(almost, DOG)) == [changed]
    assert almost.bytes < host.bytes / 10


async def test_the_least_recently_used_version_is_evicted(disk: WatchedDisk, base: dict[str, Tensor]) -> None:
    host = HostCache(disk, base, 2 * await size_of(disk, base, MUG))
    for key in (OLD_MUG, MUG, OLD_MUG):
        await use(host, key)
    await use(host, DOG)
    assert (OLD_MUG in host, MUG in host, DOG in host) == (True, False, True)
    assert host.bytes <= 2 * await size_of(disk, base, MUG)


async def test_a_version_in_use_is_not_evicted_and_others_wait(disk: WatchedDisk, base: dict[str, Tensor]) -> None:
    budget = await size_of(disk, base, MUG)
    host = HostCache(disk, base, budget)
    async with host.lease(*MUG) as tensors:
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        other = asyncio.create_task(use(host, OLD_MUG))
        await asyncio.sleep(0.2)
        assert (disk.read, other.done(), host.bytes) == ([MUG[1]], False, budget)
        assert all(torch.equal(tensors[name], before[name]) for name in before)
    await other
    assert (MUG in host, OLD_MUG in host, host.bytes) == (False, True, budget)


async def test_many_versions_at_once_stay_within_the_budget(disk: WatchedDisk, base: dict[str, Tensor]) -> None:
    budget = await size_of(disk, base, MUG)
    host, most = HostCache(disk, base, budget), 0

    async def busy(key: tuple[str, str]) -> None:
        nonlocal most
        async with host.lease(*key):
            most = max(most, host.bytes)
            await asyncio.sleep(0.01)

    async with asyncio.timeout(20):
        await asyncio.gather(*(busy(key) for key in [MUG, OLD_MUG, DOG] * 4))
    assert most <= budget


async def test_a_version_larger_than_the_budget_is_served_alone(disk: WatchedDisk, base: dict[str, Tensor]) -> None:
    host = HostCache(disk, base, 1)
    async with host.lease(*MUG):
        assert MUG in host
    assert MUG not in host


async def test_kept_versions_are_preloaded_and_never_evicted(disk: WatchedDisk, base: dict[str, Tensor]) -> None:
    host = HostCache(disk, base, await size_of(disk, base, MUG))
    await host.keep(frozenset({MUG}))
    assert disk.read == [MUG[1]]
    await use(host, OLD_MUG)
    await use(host, MUG)
    assert disk.read == [MUG[1], OLD_MUG[1]]
    await host.keep(frozenset({OLD_MUG}))
    assert (MUG in host, OLD_MUG in host) == (False, True)


async def test_a_failed_read_fails_all_who_wait_and_is_retried(disk: WatchedDisk, base: dict[str, Tensor]) -> None:
    host = HostCache(disk, base, 2**30)
    results = await asyncio.gather(use(host, ("mug", "none")), use(host, ("mug", "none")), return_exceptions=True)
    assert [type(result) for result in results] == [LookupError, LookupError]
    assert (("mug", "none") in host, host.bytes) == (False, 0)


async def test_a_store_that_comes_back_is_read_again(
    disk: WatchedDisk, base: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [OSError("connection refused"), OSError("connection reset")]

    def version(subject: str, version: str) -> Version:
        if failures:
            raise failures.pop()
        return DiskCache.version(disk, subject, version)

    monkeypatch.setattr(disk, "version", version)
    host = HostCache(disk, base, 2**30)
    assert await use(host, MUG)
    monkeypatch.setattr(weight_cache, "_RETRY_SECONDS", 0.1)
    failures.append(OSError("connection refused"))
    with pytest.raises(OSError, match="refused"):
        await use(host, DOG)
    assert await use(host, DOG)


async def test_a_version_with_a_file_missing_is_not_served_with_the_backbones_weights(
    small_sdxl: Path, base: dict[str, Tensor], tmp_path: Path
) -> None:
    store = SubjectStore(tmp_path / "store")
    [old, new, _] = publish_all(store, small_sdxl)
    host = HostCache(DiskCache(store, tmp_path, 2**30), base, 2**30)
    for path in store.local_version(old).rglob("*.safetensors"):
        path.unlink()
    with pytest.raises(FileNotFoundError):
        await use(host, OLD_MUG)
    (new.location / "manifest.json").write_json({**new.manifest, "components": ["unet", "text_encoder"]})
    with pytest.raises(ValueError, match=r"holds no text_encoder/\*\.safetensors"):
        await use(host, MUG)


async def test_a_client_that_leaves_does_not_stop_the_load_of_others(
    disk: WatchedDisk, base: dict[str, Tensor]
) -> None:
    host = HostCache(disk, base, 2**30)
    disk.gate.clear()
    leaving, staying = asyncio.create_task(use(host, MUG)), asyncio.create_task(use(host, MUG))
    await asyncio.sleep(0.05)
    leaving.cancel()
    disk.gate.set()
    assert await staying
    assert disk.read == [MUG[1]]


@pytest.fixture(scope="module")
def remote(bucket: Location, small_sdxl: Path) -> SubjectStore:
    store = SubjectStore(bucket / "weight-cache")
    publish_all(store, small_sdxl)
    return store


def folders(path: Path) -> list[str]:
    return sorted(folder.name.split("-")[0] for folder in path.iterdir() if folder.is_dir())


async def test_a_remote_version_is_downloaded_once_a_machine(
    remote: SubjectStore, base: dict[str, Tensor], tmp_path: Path
) -> None:
    expected = await use(HostCache(DiskCache(remote, tmp_path, 2**30), base, 2**30), MUG)
    [folder] = (path for path in tmp_path.iterdir() if path.is_dir())
    made = {path: path.stat().st_ctime_ns for path in folder.rglob("*.safetensors")}
    again = await use(HostCache(DiskCache(remote, tmp_path, 2**30), base, 2**30), MUG)
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    assert made == {path: path.stat().st_ctime_ns for path in folder.rglob("*.safetensors")}


async def test_the_disk_cache_evicts_the_least_recently_read_but_none_in_use(
    remote: SubjectStore, tmp_path: Path
) -> None:
    old_mug, mug, dog = remote.versions("mug") + remote.versions("dog")
    size = sum(entry["size"] for entry in mug.manifest["files"].values())
    disk = DiskCache(remote, tmp_path, 2 * size)
    for published in (old_mug, mug, old_mug, dog):
        with disk.files(published):
            pass
    assert folders(tmp_path) == [OLD_MUG[1], DOG[1]]
    with DiskCache(remote, tmp_path, 0).files(old_mug), DiskCache(remote, tmp_path, 0).files(mug):
        assert folders(tmp_path) == [OLD_MUG[1], MUG[1]]


async def test_a_version_on_the_disk_needs_no_store(
    remote: SubjectStore, base: dict[str, Tensor], tmp_path: Path
) -> None:
    expected = await use(HostCache(DiskCache(remote, tmp_path, 2**30), base, 2**30), MUG)
    away = SubjectStore(remote.root)
    away.version = lambda *_: pytest.fail("it asked the store")  # type: ignore[method-assign]
    again = await use(HostCache(DiskCache(away, tmp_path, 2**30), base, 2**30), MUG)
    assert all(torch.equal(again[name], expected[name]) for name in expected)


async def test_a_damaged_download_is_refused(remote: SubjectStore, tmp_path: Path) -> None:
    published = remote.version(*MUG)
    assert published is not None
    name = next(iter(published.manifest["files"]))
    published.manifest["files"][name]["sha256"] = "0" * 64
    with pytest.raises(OSError, match="not what was published"), DiskCache(remote, tmp_path, 2**30).files(published):
        pass
