"""ASGI middleware: bounds on the size and time of bodies, and a record of each answer in metrics and log."""

from __future__ import annotations

import asyncio
import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve import metrics
from serve.api.errors import ApiError

_LOG = logging.getLogger("ray.serve")


class BoundedBody:
    """Refuses bodies of too many bytes (413), and those that take too long to arrive (408)."""

    def __init__(self, app: ASGIApp, most_bytes: int, seconds: float) -> None:
        """Set the bounds."""
        self._app, self._most, self._seconds = app, most_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        received, whole, until = 0, False, time.monotonic() + self._seconds

        async def bounded() -> Message:
            nonlocal received, whole
            if whole:  # all that may follow is the client's disconnect
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), until - time.monotonic())
            except TimeoutError:
                raise ApiError(408, f"the body did not arrive within {self._seconds:g} s") from None
            received += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if received > self._most:
                raise ApiError(413, f"the body is larger than {self._most} bytes")
            return message

        await self._app(scope, bounded if scope["type"] == "http" else receive, send)


class Record:
    """Counts and logs each answer to an image request, with what `request.state.record` holds."""

    def __init__(self, app: ASGIApp, path: str) -> None:
        """Name the path to record."""
        self._app, self._path = app, path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http" or scope["path"] != self._path:
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 499  # unless an answer begins before the client disconnects
        record: dict[str, object] = {}
        scope.setdefault("state", {})["record"] = record

        async def record_status(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, record_status)
        finally:
            seconds = time.perf_counter() - started
            metrics.answers.inc(tags={"status": str(status)})
            metrics.seconds.observe(seconds, tags={"stage": "answer"})
            fields = {"status": status, "seconds": round(seconds, 4), **record}
            _LOG.info(" ".join(["images", *(f"{name}={value!r}" for name, value in fields.items())]), extra=fields)
