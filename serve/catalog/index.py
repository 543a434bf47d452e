"""A folder of immutable JSON files, mirrored in memory: of each, what a caller wants to keep."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from dreambooth.common.location import Location

_FRESH_SECONDS = 5.0
_STALE_SECONDS = 30.0
_PATIENCE_SECONDS = 2.0
_READS_AT_ONCE = 16
_LOG = logging.getLogger("ray.serve")

T = TypeVar("T")


class Index(Generic[T]):
    """The JSON files below a folder whose paths match a pattern, listed again when the last look is some seconds old.

    A question is answered from memory while a new listing is on its way; only an index that nobody has asked for long
    is waited for. While the folder cannot be read, the last listing holds.
    """

    def __init__(self, folder: Location, pattern: str, keep: Callable[[Any], T]) -> None:
        """Nothing is read before the first question. Of each file only what `keep` makes of its content is kept."""
        self._folder, self._pattern, self._keep = folder, re.compile(pattern), keep
        self._found: Mapping[str, T | None] = {}
        self._entries: Mapping[str, T] = {}
        self._read_at, self._tried_at = -math.inf, -math.inf
        self._thread = ThreadPoolExecutor(1, "index")
        self._reading: Future[None] | None = None

    async def entries(self) -> Mapping[str, T]:
        """What is kept of each file, by path; the same object until something has changed.

        Raises OSError when the folder has never been read and cannot be.
        """
        now = time.monotonic()
        if now - self._tried_at > _FRESH_SECONDS and (self._reading is None or self._reading.done()):
            self._tried_at = now
            self._reading = self._thread.submit(self._read)
        if self._reading is not None and now - self._read_at > _STALE_SECONDS:
            reading = asyncio.wrap_future(self._reading)
            if self._read_at == -math.inf:
                await asyncio.shield(reading)
            else:
                await asyncio.wait([reading], timeout=_PATIENCE_SECONDS)
        return self._entries

    def _read(self) -> None:
        try:
            if self._folder.local is not None and self._found and not self._folder.exists():
                raise FileNotFoundError(f"{self._folder} has gone: a file system that is no longer mounted?")
            paths = [path for path in self._folder.files() if self._pattern.fullmatch(path)]
            new = [path for path in paths if path not in self._found]
            with ThreadPoolExecutor(_READS_AT_ONCE) as threads:
                read = dict(zip(new, threads.map(self._read_file, new), strict=True))
        except OSError:
            _LOG.exception(f"cannot read {self._folder}; going by its last listing")
            raise
        if new or len(paths) != len(self._found):
            self._found = {path: read[path] if path in read else self._found[path] for path in paths}
            self._entries = {path: entry for path, entry in self._found.items() if entry is not None}
        self._read_at = time.monotonic()

    def _read_file(self, path: str) -> T | None:
        data = (self._folder / path).read_bytes()
        try:
            return self._keep(json.loads(data))
        except (ValueError, KeyError, TypeError):  # one bad file is no reason to do without the others
            _LOG.exception(f"{self._folder / path} is not what it should be; going on without it")
            return None
