"""Images that are fetched by URL: the name of each cannot be guessed, and holds the time at which it expires.

    FOLDER/EXPIRES-TOKEN.png      EXPIRES in Unix seconds, TOKEN 256 random bits

The folder is STORE/images unless another is named. There is no other state, so any number of processes may share
one folder. Whoever has the name can fetch the image, as with a signed URL.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import time
from collections.abc import Callable

from dreambooth.common.location import Location

_NAME = re.compile(r"(\d{10})-[A-Za-z0-9_-]{43}\.png")
_LOG = logging.getLogger("ray.serve")


class ImageFiles:
    """PNG files that expire."""

    def __init__(self, folder: Location, seconds: float, clock: Callable[[], float] = time.time) -> None:
        """Keep images in this folder for so many seconds."""
        self._folder, self._seconds, self._clock = folder, seconds, clock

    def add(self, png: bytes) -> str:
        """Write an image; returns its name."""
        name = f"{int(self._clock() + self._seconds):010}-{secrets.token_urlsafe(32)}.png"
        (self._folder / name).write_bytes(png)
        return name

    def expires(self, name: str) -> int | None:
        """Unix time at which the image expires; None when it has expired, or the name is none of ours."""
        match = _NAME.fullmatch(name)
        return int(match[1]) if match and int(match[1]) > self._clock() else None

    def read(self, name: str) -> bytes | None:
        """The image of this name, or None when there is none or it has expired."""
        if self.expires(name) is None:
            return None
        try:
            return (self._folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def clear(self) -> int:
        """Remove expired images; returns how many."""
        expired = [name for name in self._folder.names() if _NAME.fullmatch(name) and self.expires(name) is None]
        for name in expired:
            location = self._folder / name
            with contextlib.suppress(FileNotFoundError):  # another process has removed it
                location.filesystem.delete_file(location.path)
        return len(expired)

    async def keep_clear(self) -> None:
        """Remove expired images, for ever."""
        while True:
            await asyncio.sleep(min(self._seconds, 60.0))
            try:
                await asyncio.to_thread(self.clear)
            except OSError:
                _LOG.exception(f"cannot clear {self._folder}; the next try is in a minute or less")
