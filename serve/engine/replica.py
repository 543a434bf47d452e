"""The subject replica: draws images of any subject of one backbone, in batches, while it loads the next subjects."""

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

_KEEP_SECONDS = 10.0
_LOG = logging.getLogger("ray.serve")


class _Abandoned(Exception):
    """Nobody waits for any image of the batch any more."""


class SubjectReplica:
    """Draws images of any subject of one backbone."""

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
        """Load the backbone with hash `backbone`; subjects wait until they are asked for, but for those in `keep`."""
        metrics.label_by_replica()
        torch.set_num_threads(threads)
        self._store = SubjectStore(store_uri)
        self._backbone = self._store.open_backbone(backbone)
        self._pipeline = SwapPipeline(self._backbone, DTYPES[precision], torch.device(device))
        tier = DiskCache(self._store, Path(disk).expanduser(), disk_space)
        self._host = HostCache(tier, self._pipeline.base, host_memory, pin=device == "cuda")
        self._hash, self._batch, self._wedged_after = backbone, batch, wedged_after
        self._scheduler = FairScheduler()
        self._device = ThreadPoolExecutor(1, "device", torch.set_num_threads, (threads,))
        self._encoders = ThreadPoolExecutor(2, "encode")
        self._pumping: asyncio.Task[None] | None = None
        self._beat: float | None = None  # when the device last finished a step; None while it has nothing to do
        self._broken = False
        self._keeping = asyncio.create_task(self._keep_loaded(keep)) if keep else None

    # -- orders --------------------------------------------------------------------------------------------------------

    async def draw(self, order: GenerationRequest) -> AsyncIterator[DrawnImage]:
        """The images in the order in which they are finished; raises BadRequest before any weights move.

        An order that is given up while it waits leaves the queue; one that is being drawn ends after the step.
        """
        check(order, self._backbone)
        async with self._host.lease(order.subject, order.version) as tensors:
            results: asyncio.Queue[DrawnImage | Exception] = asyncio.Queue()
            jobs = [Job(order, number, tensors, results) for number in range(len(order.seeds))]
            for job in jobs:
                self._scheduler.add(job)
            metrics.waiting.set(len(self._scheduler))
            if self._pumping is None or self._pumping.done():
                self._pumping = asyncio.create_task(self._pump())
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
                    job.abandoned = True
                    self._scheduler.remove(job)

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica whose check fails: raises when the device is stuck."""
        if self._beat is not None and time.monotonic() - self._beat > self._wedged_after:
            raise RuntimeError(f"the device has not finished a step for {self._wedged_after:g} s")
        if self._broken:
            raise RuntimeError("the device has failed; only a new process can use it again")

    # -- the device ----------------------------------------------------------------------------------------------------

    async def _pump(self) -> None:
        loop = asyncio.get_running_loop()
        while len(self._scheduler):
            batch = self._scheduler.take(self._batch)
            metrics.waiting.set(len(self._scheduler))
            metrics.batches.observe(len(batch))
            for job in batch:
                metrics.seconds.observe(time.perf_counter() - job.since, tags={"stage": "wait"})
            self._beat = time.monotonic()
            try:
                pixels = await loop.run_in_executor(self._device, self._sample, batch, loop)
                self._encode(batch, pixels, None, loop)
            except _Abandoned:
                pass
            except Exception as error:
                self._broken = self._broken or isinstance(error, torch.AcceleratorError)
                for job in batch:
                    job.results.put_nowait(error)
            finally:
                self._beat = None

    def _sample(self, batch: list[Job], loop: asyncio.AbstractEventLoop) -> np.ndarray:
        order, started = batch[0].order, time.perf_counter()
        if self._pipeline.load_version(order.model, batch[0].tensors):
            metrics.swaps.inc()
            metrics.seconds.observe(time.perf_counter() - started, tags={"stage": "swap"})
        started = time.perf_counter()

        def on_step(step: int, preview: Callable[[], np.ndarray]) -> None:
            self._beat = time.monotonic()
            if all(job.abandoned for job in batch):
                raise _Abandoned
            shown = {job: preview_after(step, job.order) for job in batch}
            if any(number is not None for number in shown.values()):
                pixels = preview()
                for number in sorted({number for number in shown.values() if number is not None}):
                    rows = [row for row, job in enumerate(batch) if shown[job] == number]
                    self._encode([batch[row] for row in rows], pixels[rows], number, loop)

        pixels = self._pipeline.draw(
            order,
            [(job.order.prompt, job.order.negative_prompt) for job in batch],
            [job.order.seeds[job.number] for job in batch],
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
                result = ArithmeticError(f"{job.order.model}, seed {job.order.seeds[job.number]}: {error}")
            loop.call_soon_threadsafe(job.results.put_nowait, result)

        for job, image in zip(jobs, pixels, strict=True):
            self._encoders.submit(encode, job, image)

    # -- subjects to keep ----------------------------------------------------------------------------------------------

    async def _keep_loaded(self, models: Sequence[str]) -> None:
        while True:
            try:
                await self._host.keep(await asyncio.to_thread(self._named, models))
            except Exception:  # the store may be away for a while; requests do not depend on this
                _LOG.exception("could not load the subjects to keep")
            await asyncio.sleep(_KEEP_SECONDS)

    def _named(self, models: Sequence[str]) -> frozenset[tuple[str, str]]:
        found = set()
        for model in models:
            subject, _, version = model.partition("@")
            published = [one for one in self._store.versions(subject) if version in ("", one.id)][-1:]
            found |= {(subject, one.id) for one in published if one.manifest["backbone"]["hash"] == self._hash}
        return frozenset(found)


def preview_after(step: int, order: GenerationRequest) -> int | None:
    """The number of the preview that is due after a step (from 0), or None; previews divide the steps evenly."""
    due = [(number + 1) * order.steps // (order.previews + 1) - 1 for number in range(order.previews)]
    return max((number for number, at in enumerate(due) if at == step), default=None)


def png(pixels: np.ndarray) -> bytes:
    """A PNG file of pixels (height, width, 3) in [0, 1]; ArithmeticError when some are not finite."""
    if not np.isfinite(pixels).all():
        raise ArithmeticError("the pixels are not finite")
    started, file = time.perf_counter(), io.BytesIO()
    Image.fromarray((pixels * 255).round().astype("uint8")).save(file, "PNG")
    metrics.seconds.observe(time.perf_counter() - started, tags={"stage": "encode"})
    return file.getvalue()
