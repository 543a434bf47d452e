"""An index in memory of a folder of immutable JSON files."""

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
_WAIT_SECONDS = 2.0
_PARALLEL_READS = 16
_LOG = logging.getLogger("ray.serve")

T = TypeVar("T")


class Index(Generic[T]):
    """The JSON files below a folder whose paths match a pattern; listed again when the last listing is seconds old.

    A query is answered from memory while a new listing is being read; it waits only when the last one is old. While the
    folder cannot be read, the last listing stays valid.
    """

    def __init__(self, folder: Location, pattern: str, keep: Callable[[Any], T]) -> None:
        """Read nothing before the first query. `keep` turns the content of a file into its entry."""
        self._folder, self._pattern, self._keep = folder, re.compile(pattern), keep
        self._found: Mapping[str, T | None] = {}
        self._entries: Mapping[str, T] = {}
        self._read_at, self._tried_at = -math.inf, -math.inf
        self._thread = ThreadPoolExecutor(1, "index")
        self._reading: Future[None] | None = None

    async def entries(self) -> Mapping[str, T]:
        """The entries by path; the same object until something has changed.

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
                await asyncio.wait([reading], timeout=_WAIT_SECONDS)
        return self._entries

    def _read(self) -> None:
        try:
            if self._folder.local is not None and self._found and not self._folder.exists():
                raise FileNotFoundError(f"{self._folder} has disappeared: is the file system still mounted?")
            paths = [path for path in self._folder.files() if self._pattern.fullmatch(path)]
            new = [path for path in paths if path not in self._found]
            with ThreadPoolExecutor(_PARALLEL_READS) as threads:
                read = dict(zip(new, threads.map(self._read_file, new), strict=True))
        except OSError:
            _LOG.exception(f"cannot read {self._folder}; the last listing stays valid")
            raise
        if new or len(paths) != len(self._found):
            self._found = {path: read[path] if path in read else self._found[path] for path in paths}
            self._entries = {path: entry for path, entry in self._found.items() if entry is not None}
        self._read_at = time.monotonic()

    def _read_file(self, path: str) -> T | None:
        data = (self._folder / path).read_bytes()
        try:
            return self._keep(json.loads(data))
        except (ValueError, KeyError, TypeError):  # one malformed file must not hide the others
            _LOG.exception(f"{self._folder / path} is malformed; it is left out")
            return None
