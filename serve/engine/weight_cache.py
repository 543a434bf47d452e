"""Two caches of the weights of versions: in host memory, and on the local disk for a remote store."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from dreambooth.common.location import Location, digest
from dreambooth.store import SubjectStore, Version
from dreambooth.versions import form_of
from serve import metrics
from serve.engine.swap_pipeline import tensor_named

_PARALLEL_LOADS = 4
_RETRY_SECONDS = 60.0
_ALIGNMENT = 64
_LOG = logging.getLogger("ray.serve")

T = TypeVar("T")


@dataclass(frozen=True)
class Weights:
    """The tensors in which a version differs from its backbone, by `COMPONENT.NAME`, and the bytes they take."""

    tensors: Mapping[str, Tensor]
    bytes: int


class DiskCache:
    """Versions of a remote store on the local disk, shared by the replicas of the machine.

    A store on a disk is read in place, and nothing is copied.
    """

    def __init__(self, store: SubjectStore, folder: Path, budget: int) -> None:
        """Keep versions in `folder`; beyond `budget` bytes the least recently read are evicted."""
        self._store, self._folder, self._budget = store, folder, budget

    def version(self, subject: str, version: str) -> Version:
        """A published version, by the manifest on the disk if there is one; LookupError when it was never published."""
        location = self._store.version_location(subject, version)
        with contextlib.suppress(FileNotFoundError):
            manifest = json.loads((self._folder_of(location) / "manifest.json").read_text())
            return Version(subject, version, location, manifest)
        published = self._store.version(subject, version)
        if published is None:
            raise LookupError(f"{subject}@{version} is not in {self._store.root}")
        return published

    @contextlib.contextmanager
    def files(self, published: Version) -> Iterator[Path]:
        """The folder of a version's files, downloaded if necessary; it is not evicted before the context ends."""
        if published.location.local is not None:
            metrics.reads.inc(tags={"tier": "store"})
            yield published.location.local
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        folder = self._folder_of(published.location)
        with FileLock(f"{folder}.lock"):
            metrics.reads.inc(tags={"tier": "disk" if folder.exists() else "store"})
            if not folder.exists():
                with FileLock(self._folder / "room.lock"):
                    self._evict(sum(entry["size"] for entry in published.manifest["files"].values()))
                self._download(published, folder)
            os.utime(folder)
            yield folder

    def _folder_of(self, location: Location) -> Path:
        return self._folder / f"{location.name}-{digest(location.uri, 16)}"

    def _download(self, published: Version, folder: Path) -> None:
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        published.location.download(partial)
        for name, entry in published.manifest["files"].items():
            if Location.of(partial / name).sha256() != entry["sha256"]:
                raise OSError(f"{published.location / name} is not what was published: its SHA-256 differs")
        partial.rename(folder)

    def _evict(self, size: int) -> None:
        folders = [path for path in self._folder.iterdir() if path.is_dir() and path.suffix != ".partial"]
        sizes = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in folders}
        total = sum(sizes.values())
        for folder in sorted(folders, key=lambda path: path.stat().st_mtime):
            if total + size <= self._budget:
                return
            with contextlib.suppress(Timeout), FileLock(f"{folder}.lock", timeout=0):  # locked while a replica reads it
                partial = folder.with_name(f"{folder.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                folder.rename(partial)  # so that a process killed here leaves no half a version
                shutil.rmtree(partial)
                total -= sizes[folder]


@dataclass
class _CacheEntry:
    """A version in host memory, or being loaded; `bytes` is 0 until space is reserved for it."""

    loading: asyncio.Task[Weights]
    bytes: int = 0
    users: int = 0

    @property
    def busy(self) -> bool:
        return self.users > 0 or not self.loading.done()


class HostCache:
    """A cache of tensors in host memory, by version: read once for concurrent requests, never evicted while in use.

    Beyond a budget of bytes, the least recently used of the unused versions are evicted. A version that does not fit
    waits for others to be released; it exceeds the budget only when it does not fit an otherwise idle cache.
    """

    def __init__(self, disk: DiskCache, base: Mapping[str, Tensor], budget: int, pin: bool = False) -> None:
        """Start empty. Tensors take the dtype and layout that they have in `base`; those equal to it are not kept.

        `pin` keeps them in page-locked memory, from which CUDA copies directly.
        """
        self._disk, self._base, self._budget, self._pin = disk, base, budget, pin
        self._entries: OrderedDict[tuple[str, str], _CacheEntry] = OrderedDict()
        self._kept: frozenset[tuple[str, str]] = frozenset()
        self._changed = asyncio.Event()
        self._threads = ThreadPoolExecutor(_PARALLEL_LOADS, "load")

    @contextlib.asynccontextmanager
    async def lease(self, subject: str, version: str) -> AsyncIterator[Mapping[str, Tensor]]:
        """The tensors of a version, which are not evicted before the context ends."""
        key = (subject, version)
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _CacheEntry(asyncio.create_task(self._load(key)))
        else:
            metrics.reads.inc(tags={"tier": "host"})
        entry.users += 1
        try:
            weights = await asyncio.shield(entry.loading)
            self._entries.move_to_end(key)
            yield weights.tensors
        finally:
            entry.users -= 1
            self._evict_to_budget()
            self._changed.set()

    async def keep(self, versions: frozenset[tuple[str, str]]) -> None:
        """Load these versions and never evict them; those of an earlier call may be evicted again."""
        self._kept = versions
        await asyncio.gather(*(self._preload(*key) for key in versions - self._entries.keys()))

    async def _preload(self, subject: str, version: str) -> None:
        async with self.lease(subject, version):
            pass

    @property
    def bytes(self) -> int:
        """Bytes in the cache, with those reserved for the versions being loaded."""
        return sum(entry.bytes for entry in self._entries.values())

    def __contains__(self, key: tuple[str, str]) -> bool:
        """Whether the version is in the cache, or being loaded."""
        return key in self._entries

    async def _load(self, key: tuple[str, str]) -> Weights:
        started = time.perf_counter()
        try:
            published = await self._with_retries(self._disk.version, *key)
            await self._reserve(key, self._upper_bound(published))
            weights = await self._with_retries(self._read, published)
        except BaseException:
            del self._entries[key]
            self._changed.set()
            raise
        self._entries[key].bytes = weights.bytes
        self._evict_to_budget()
        self._changed.set()
        metrics.seconds.observe(time.perf_counter() - started, tags={"stage": "load"})
        return weights

    async def _with_retries(self, read: Callable[..., T], *args: Any) -> T:
        """Call `read` in a thread; retry for a while when the store cannot be reached."""
        end, pause = time.monotonic() + _RETRY_SECONDS, 0.5
        while True:
            try:
                return await asyncio.get_running_loop().run_in_executor(self._threads, read, *args)
            except FileNotFoundError:
                raise
            except OSError as error:
                if time.monotonic() + pause > end:
                    raise
                _LOG.warning(f"cannot read the store, trying again in {pause:g} s: {error}")
            await asyncio.sleep(pause)
            pause = min(2 * pause, 5.0)

    async def _reserve(self, key: tuple[str, str], size: int) -> None:
        while not self._evict_to_budget(size) and any(entry.bytes and entry.busy for entry in self._entries.values()):
            self._changed.clear()
            await self._changed.wait()
        self._entries[key].bytes = size

    def _evict_to_budget(self, needed: int = 0) -> bool:
        """Evict unused versions until `needed` bytes fit; False when they do not."""
        for key, entry in list(self._entries.items()):
            if self.bytes + needed <= self._budget:
                break
            if entry.bytes and not entry.busy and key not in self._kept:
                del self._entries[key]
        metrics.host_bytes.set(self.bytes)
        return self.bytes + needed <= self._budget

    def _upper_bound(self, published: Version) -> int:
        manifest = published.manifest
        return form_of(manifest).most_bytes(published.components, manifest["files"], self._base)

    def _read(self, published: Version) -> Weights:
        form, files = form_of(published.manifest), published.manifest["files"]
        with self._disk.files(published) as folder:
            found: dict[str, Tensor] = {}
            try:
                for name, tensor in form.changes(folder, published.components, files, self._base):
                    self._take(found, name, tensor)
            except ValueError as error:
                raise ValueError(f"{published.subject}@{published.id} {error}") from error
            return self._pack(found)

    def _take(self, found: dict[str, Tensor], name: str, tensor: Tensor) -> None:
        try:
            base = tensor_named(self._base, name)
        except LookupError:
            base = None
        if base is None or base.shape != tensor.shape:
            raise ValueError(f"does not fit its backbone: {name}")
        tensor = tensor.to(base.dtype)
        if not torch.equal(tensor, base):
            found[name] = tensor

    def _pack(self, found: Mapping[str, Tensor]) -> Weights:
        """Copy the tensors, which may be views of memory-mapped files, into one block."""
        starts, size = {}, 0
        for name, tensor in found.items():
            starts[name] = size
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        if self._pin:
            size = 1 << max(size - 1, 0).bit_length()  # torch rounds page-locked blocks up to a power of two
        block = torch.empty(size, dtype=torch.uint8, pin_memory=self._pin)
        tensors = {}
        for name, tensor in found.items():
            base, start = tensor_named(self._base, name), starts[name]
            flat = block[start : start + tensor.nbytes].view(base.dtype)
            tensors[name] = flat.as_strided(base.shape, base.stride()).copy_(tensor)
        return Weights(tensors, size)
