"""Bearer keys: who may ask, for whose subjects, and how much. `dreambooth keys` makes and revokes them.

    FOLDER/HASH.json       what a key may do, under the SHA-256 of the key; the key itself is kept nowhere

The folder is STORE/keys unless another is named. A key is revoked by removing its file.
"""

from __future__ import annotations

import hashlib
import ipaddress
import math
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from dreambooth.common.location import Location
from serve.api import errors
from serve.api.errors import ApiError
from serve.catalog.index import Index
from serve.request import GenerationRequest

_PREFIX = "db-"


# -- keys --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """A key without its secret, and what it may do."""

    id: str
    """The first digits of its hash: names the key in logs and commands."""
    tenant: str
    """Whose key it is."""
    subjects: tuple[str, ...]
    """The tenant's subjects: names, or patterns such as `acme-*`."""
    created: str
    """ISO 8601, UTC."""
    images_per_minute: int | None = None
    largest_side: int | None = None
    """Images with a longer side, in pixels, are refused."""
    admin: bool = False
    """May see every subject, and list and revoke keys over HTTP."""

    def sees(self, subject: str) -> bool:
        """Whether this key gives access to the subject."""
        return self.admin or any(fnmatchcase(subject, pattern) for pattern in self.subjects)


ANYONE = Key("", "", ("*",), "")
"""Every client of a server without keys."""


class KeyFolder:
    """The files of the keys."""

    def __init__(self, folder: Location) -> None:
        """Read and write nothing yet."""
        self.folder = folder

    def make(self, tenant: str, subjects: tuple[str, ...], **limits: Any) -> tuple[str, Key]:
        """Make a key; returns its secret, of which only the hash is written, and the key."""
        secret = _PREFIX + secrets.token_urlsafe(32)
        name = _hash(secret)
        key = Key(name[:12], tenant, subjects, datetime.now(UTC).isoformat(timespec="seconds"), **limits)
        (self.folder / f"{name}.json").write_json(asdict(key))
        return secret, key

    def all(self) -> list[Key]:
        """All keys that are not revoked, oldest first."""
        found = [_parse((self.folder / name).read_json()) for name in self.folder.names() if name.endswith(".json")]
        return sorted(found, key=lambda key: (key.created, key.id))

    def revoke(self, key_id: str) -> None:
        """Remove the key with this id; ValueError when there is none."""
        names = [name for name in self.folder.names() if name[:12] == key_id and name.endswith(".json")]
        if not names:
            raise ValueError(f"there is no key {key_id!r} in {self.folder}: `list` shows the ids")
        location = self.folder / names[0]
        location.filesystem.delete_file(location.path)


class KeyRing:
    """The keys in memory, for a server: a key is made or revoked some seconds after its file."""

    def __init__(self, folder: Location, clock: Callable[[], float] = time.monotonic) -> None:
        """Read nothing before the first query."""
        self._index = Index(folder, r"[0-9a-f]{64}\.json", _parse)
        self._clock = clock
        self._spent: dict[str, tuple[float, float]] = {}

    async def find(self, secret: str) -> Key | None:
        """The key with this secret; None when it was never made, or is revoked."""
        return (await self._index.entries()).get(f"{_hash(secret)}.json")

    def spend(self, key: Key, images: int) -> float:
        """Count images against the rate of the key; returns the seconds to wait, 0 when it allows them now.

        A token bucket that holds the images of one minute. Each ingress process counts by itself.
        """
        if key.images_per_minute is None:
            return 0.0
        now, a_second = self._clock(), key.images_per_minute / 60
        spent, at = self._spent.get(key.id, (0.0, now))
        spent = max(0.0, spent - (now - at) * a_second) + images
        excess = spent - key.images_per_minute
        if excess > 0:
            return math.ceil(excess / a_second)
        self._spent[key.id] = (spent, now)
        return 0.0


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _parse(entry: dict[str, Any]) -> Key:
    return Key(**{**entry, "subjects": tuple(entry["subjects"])})


def folder_of(store: str, keys: str | None) -> KeyFolder:
    """The folder of keys: `keys`, or the one in the store."""
    return KeyFolder(Location.of(keys) if keys else Location.of(store) / "keys")


# -- who asks ----------------------------------------------------------------------------------------------------------


_BEARER = HTTPBearer(auto_error=False, description="A key made by `python -m serve.keys make`.")


def is_loopback(host: str) -> bool:
    """Whether this IP address or host name is reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_reach(request: Request) -> None:
    """Refuse clients on other machines when there are no keys."""
    if request.app.state.ring is None and (request.client is None or not is_loopback(request.client.host)):
        raise ApiError(403, "this server has no keys, so it answers clients on its own machine only")


async def _holder(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)],
    _: Annotated[None, Depends(check_reach)],
) -> Key:
    ring: KeyRing | None = request.app.state.ring
    if ring is None:
        return ANYONE
    key = await ring.find(credentials.credentials) if credentials else None
    if key is None:
        what = "the key is not valid" if credentials else "send a key, as Authorization: Bearer KEY"
        raise ApiError(401, what, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
    return key


Holder = Annotated[Key, Depends(_holder)]


async def _admin(key: Holder) -> Key:
    if not key.admin:
        raise ApiError(403, "this needs an admin key", code="insufficient_permissions")
    return key


Admin = Annotated[Key, Depends(_admin)]


# -- how much a key allows ---------------------------------------------------------------------------------------------


def admit(request: GenerationRequest, key: Key, ring: KeyRing | None) -> None:
    """Count a request against its key; ApiError when the key does not allow it, or not yet."""
    side = max(request.width, request.height)
    if key.largest_side is not None and side > key.largest_side:
        raise ApiError(400, f"size: this key's images have sides of at most {key.largest_side}", "size")
    if key.images_per_minute is not None and len(request.seeds) > key.images_per_minute:
        raise ApiError(400, f"n: this key may draw at most {key.images_per_minute} images a minute", "n")
    if ring is not None and (wait := ring.spend(key, len(request.seeds))):
        rate = f"this key may draw {key.images_per_minute} images a minute: come again in {wait:g} s"
        raise errors.too_many(rate, "rate_limit_exceeded", wait)
