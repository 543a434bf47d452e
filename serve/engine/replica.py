"""The replica: draws images of all versions of one backbone, in batches, while it loads the next weights."""

from __future__ import annotations

import asyncio
import io
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dreambooth.backbones.precision import DTYPES
from dreambooth.store import SubjectStore
from serve import metrics
from serve.engine.scheduler import FairScheduler, Job
from serve.engine.swap_pipeline import SwapPipeline
from serve.engine.weight_cache import DiskCache, HostCache
from serve.request import DrawnImage, GenerationRequest, check

_PRELOAD_SECONDS = 10.0
_LOG = logging.getLogger("ray.serve")


class _Cancelled(Exception):
    """All requests of the batch were cancelled."""


class SubjectReplica:
    """Draws images of all versions of one backbone."""

    def __init__(
        self,
        store_uri: str,
        backbone: str,
        *,
        precision: str,
        device: str,
        threads: int,
        batch: int,
        host_memory: int,
        disk: str,
        disk_space: int,
        keep: Sequence[str],
        wedged_after: float,
    ) -> None:
        """Load the backbone with this hash. Versions are loaded on request, except those in `keep`: now."""
        metrics.label_by_replica()
        torch.set_num_threads(threads)
        self._store = SubjectStore(store_uri)
        self._backbone = self._store.open_backbone(backbone)
        self._pipeline = SwapPipeline(self._backbone, DTYPES[precision], torch.device(device))
        disk_cache = DiskCache(self._store, Path(disk).expanduser(), disk_space)
        self._host = HostCache(disk_cache, self._pipeline.base, host_memory, pin=device == "cuda")
        self._hash, self._batch, self._wedged_after = backbone, batch, wedged_after
        self._scheduler = FairScheduler()
        self._device = ThreadPoolExecutor(1, "device", torch.set_num_threads, (threads,))
        self._encoders = ThreadPoolExecutor(2, "encode")
        self._drawing: asyncio.Task[None] | None = None
        self._last_step: float | None = None  # monotonic time of the device's last step; None while it is idle
        self._broken = False
        self._preloading = asyncio.create_task(self._preload(keep)) if keep else None

    # -- requests ------------------------------------------------------------------------------------------------------

    async def draw(self, request: GenerationRequest) -> AsyncIterator[DrawnImage]:
        """The images, as they are finished; BadRequest before any weights are loaded.

        A request that is cancelled while it waits leaves the queue; the drawing of a batch ends after the current step
        when all its requests are cancelled.
        """
        check(request, self._backbone)
        async with self._host.lease(request.subject, request.version) as tensors:
            results: asyncio.Queue[DrawnImage | Exception] = asyncio.Queue()
            jobs = [Job(request, number, tensors, results) for number in range(len(request.seeds))]
            for job in jobs:
                self._scheduler.add(job)
            metrics.waiting.set(len(self._scheduler))
            if self._drawing is None or self._drawing.done():
                self._drawing = asyncio.create_task(self._draw_batches())
            left = len(jobs)
            try:
                while left:
                    result = await results.get()
                    if isinstance(result, Exception):
                        raise result
                    left -= result.preview is None
                    yield result
            finally:
                for job in jobs:
                    job.cancelled = True
                    self._scheduler.remove(job)

    def check_health(self) -> None:
        """Raise RuntimeError when the device is stuck or broken; Ray Serve then replaces the replica."""
        if self._last_step is not None and time.monotonic() - self._last_step > self._wedged_after:
            raise RuntimeError(f"the device has not finished a step for {self._wedged_after:g} s")
        if self._broken:
            raise RuntimeError("the device has failed; only a new process can use it again")

    # -- the device ----------------------------------------------------------------------------------------------------

    async def _draw_batches(self) -> None:
        loop = asyncio.get_running_loop()
        while len(self._scheduler):
            batch = self._scheduler.take(self._batch)
            metrics.waiting.set(len(self._scheduler))
            metrics.batches.observe(len(batch))
            for job in batch:
                metrics.seconds.observe(time.perf_counter() - job.since, tags={"stage": "wait"})
            self._last_step = time.monotonic()
            try:
                pixels = await loop.run_in_executor(self._device, self._sample, batch, loop)
                self._encode(batch, pixels, None, loop)
            except _Cancelled:
                pass
            except Exception as error:
                self._broken = self._broken or isinstance(error, torch.AcceleratorError)
                for job in batch:
                    job.results.put_nowait(error)
            finally:
                self._last_step = None

    def _sample(self, batch: list[Job], loop: asyncio.AbstractEventLoop) -> np.ndarray:
        request, started = batch[0].request, time.perf_counter()
        if self._pipeline.load_version(request.model, batch[0].tensors):
            metrics.swaps.inc()
            metrics.seconds.observe(time.perf_counter() - started, tags={"stage": "swap"})
        started = time.perf_counter()

        def on_step(step: int, preview: Callable[[], np.ndarray]) -> None:
            self._last_step = time.monotonic()
            if all(job.cancelled for job in batch):
                raise _Cancelled
            shown = {job: preview_after(step, job.request) for job in batch}
            if any(number is not None for number in shown.values()):
                pixels = preview()
                for number in sorted({number for number in shown.values() if number is not None}):
                    rows = [row for row, job in enumerate(batch) if shown[job] == number]
                    self._encode([batch[row] for row in rows], pixels[rows], number, loop)

        pixels = self._pipeline.draw(
            request,
            [(job.request.prompt, job.request.negative_prompt) for job in batch],
            [job.request.seeds[job.number] for job in batch],
            on_step,
        )
        metrics.seconds.observe(time.perf_counter() - started, tags={"stage": "sample"})
        return pixels

    def _encode(
        self, jobs: Sequence[Job], pixels: np.ndarray, preview: int | None, loop: asyncio.AbstractEventLoop
    ) -> None:
        def encode(job: Job, image: np.ndarray) -> None:
            result: DrawnImage | Exception
            try:
                result = DrawnImage(job.number, png(image), preview, len(jobs))
            except ArithmeticError as error:
                result = ArithmeticError(f"{job.request.model}, seed {job.request.seeds[job.number]}: {error}")
            loop.call_soon_threadsafe(job.results.put_nowait, result)

        for job, image in zip(jobs, pixels, strict=True):
            self._encoders.submit(encode, job, image)

    # -- preloaded versions --------------------------------------------------------------------------------------------

    async def _preload(self, models: Sequence[str]) -> None:
        while True:
            try:
                await self._host.keep(await asyncio.to_thread(self._named, models))
            except Exception:  # the store may be unreachable for a while; requests do not depend on this
                _LOG.exception("could not load the subjects to keep")
            await asyncio.sleep(_PRELOAD_SECONDS)

    def _named(self, models: Sequence[str]) -> frozenset[tuple[str, str]]:
        found = set()
        for model in models:
            subject, _, version = model.partition("@")
            published = [one for one in self._store.versions(subject) if version in ("", one.id)][-1:]
            found |= {(subject, one.id) for one in published if one.manifest["backbone"]["hash"] == self._hash}
        return frozenset(found)


def preview_after(step: int, request: GenerationRequest) -> int | None:
    """Index of the preview to send after this step (from 0), or None; previews divide the steps evenly."""
    due = [(number + 1) * request.steps // (request.previews + 1) - 1 for number in range(request.previews)]
    return max((number for number, at in enumerate(due) if at == step), default=None)


def png(pixels: np.ndarray) -> bytes:
    """A PNG file of pixels (height, width, 3) in [0, 1]; ArithmeticError when some are not finite."""
    if not np.isfinite(pixels).all():
        raise ArithmeticError("the pixels are not finite")
    started, file = time.perf_counter(), io.BytesIO()
    Image.fromarray((pixels * 255).round().astype("uint8")).save(file, "PNG")
    metrics.seconds.observe(time.perf_counter() - started, tags={"stage": "encode"})
    return file.getvalue()
