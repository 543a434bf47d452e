"""A folder of immutable JSON files, mirrored in memory."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from dreambooth.storage import Location

_FRESH_SECONDS = 5.0
_STALE_SECONDS = 30.0
_PATIENCE_SECONDS = 2.0
_READS_AT_ONCE = 16
_LOG = logging.getLogger("ray.serve")


class Index:
    """The JSON files below a folder whose paths match a pattern, listed again when the last look is some seconds old.

    A question is answered from memory while a new listing is on its way; only an index that nobody has asked for long
    is waited for. While the folder cannot be read, the last listing holds.
    """

    def __init__(self, folder: Location, pattern: str) -> None:
        """Nothing is read before the first question."""
        self._folder, self._pattern = folder, re.compile(pattern)
        self._entries: Mapping[str, Any] = {}
        self._read_at, self._tried_at = -math.inf, -math.inf
        self._thread = ThreadPoolExecutor(1, "index")
        self._reading: Future[None] | None = None

    async def entries(self) -> Mapping[str, Any]:
        """Parsed files by path; the same object until something has changed."""
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
            paths = [path for path in self._folder.files() if self._pattern.fullmatch(path)]
            new = [path for path in paths if path not in self._entries]
            with ThreadPoolExecutor(_READS_AT_ONCE) as threads:
                read = dict(zip(new, threads.map(lambda path: (self._folder / path).read_json(), new), strict=True))
        except OSError:
            _LOG.exception(f"cannot read {self._folder}; going by its last listing")
            raise
        if new or len(paths) != len(self._entries):
            self._entries = {path: read.get(path, self._entries.get(path)) for path in paths}
        self._read_at = time.monotonic()
