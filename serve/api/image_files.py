"""Images to be fetched by URL: each under a name that nobody can guess and that says until when it may be fetched.

    FOLDER/EXPIRES-TOKEN.png      EXPIRES in Unix seconds, TOKEN 256 random bits

The folder is STORE/images unless another is named. There is nothing else to keep, so any number of processes may
write, read and clear one folder; whoever has the name has the image, as with a signed URL.
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
    """PNG files that are there for a while."""

    def __init__(self, folder: Location, seconds: float, clock: Callable[[], float] = time.time) -> None:
        """Name the folder, and for how long an image stays."""
        self._folder, self._seconds, self._clock = folder, seconds, clock

    def add(self, png: bytes) -> str:
        """Keep an image; returns its name."""
        name = f"{int(self._clock() + self._seconds):010}-{secrets.token_urlsafe(32)}.png"
        (self._folder / name).write_bytes(png)
        return name

    def expires(self, name: str) -> int | None:
        """Until when the image of this name may be fetched, in Unix seconds; None when it no longer may, or never."""
        match = _NAME.fullmatch(name)
        return int(match[1]) if match and int(match[1]) > self._clock() else None

    def read(self, name: str) -> bytes | None:
        """The image of this name, or None when there is none or its time is over."""
        if self.expires(name) is None:
            return None
        try:
            return (self._folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def clear(self) -> int:
        """Remove the images whose time is over; returns how many."""
        over = [name for name in self._folder.names() if _NAME.fullmatch(name) and self.expires(name) is None]
        for name in over:
            location = self._folder / name
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                location.filesystem.delete_file(location.path)
        return len(over)

    async def keep_clear(self) -> None:
        """Clear the folder again and again."""
        while True:
            await asyncio.sleep(min(self._seconds, 60.0))
            try:
                await asyncio.to_thread(self.clear)
            except OSError:
                _LOG.exception(f"cannot clear {self._folder}; trying again later")
