"""Bearer keys: who may ask, for whose subjects, and how much. `python -m serve.keys --help` makes and revokes them.

    FOLDER/HASH.json       what a key may do, under the SHA-256 of the key; the key itself is kept nowhere

The folder is STORE/keys unless another is named. A key is revoked by removing its file.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any

import tyro

from dreambooth.storage import Location
from serve.index import Index

_PREFIX = "db-"


@dataclass(frozen=True)
class Key:
    """What a key may do."""

    id: str
    """The first digits of its hash; names the key where the key itself must not be written."""
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
    """Sees every subject, and lists and revokes keys over HTTP."""

    def sees(self, subject: str) -> bool:
        """Whether the subject exists for the holder of this key."""
        return self.admin or any(fnmatchcase(subject, pattern) for pattern in self.subjects)


ANYONE = Key("", "", ("*",), "")
"""What a server without keys grants to all who reach it."""


class KeyFolder:
    """The keys' files."""

    def __init__(self, folder: Location) -> None:
        """Name the folder; nothing is read or written yet."""
        self.folder = folder

    def make(self, tenant: str, subjects: tuple[str, ...], **limits: Any) -> tuple[str, Key]:
        """A new key and what it may do; only its hash is written."""
        secret = _PREFIX + secrets.token_urlsafe(32)
        name = _hash(secret)
        key = Key(name[:12], tenant, subjects, datetime.now(UTC).isoformat(timespec="seconds"), **limits)
        (self.folder / f"{name}.json").write_json(asdict(key))
        return secret, key

    def all(self) -> list[Key]:
        """The keys that are not revoked, oldest first."""
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
    """The keys as a server sees them: looked up in memory, known or revoked some seconds after the files change."""

    def __init__(self, folder: Location, clock: Callable[[], float] = time.monotonic) -> None:
        """Nothing is read before the first question."""
        self._index = Index(folder, r"[0-9a-f]{64}\.json", _parse)
        self._clock = clock
        self._spent: dict[str, tuple[float, float]] = {}

    async def find(self, secret: str) -> Key | None:
        """What the key may do, or None when it was never made or is revoked."""
        return (await self._index.entries()).get(f"{_hash(secret)}.json")

    def spend(self, key: Key, images: int) -> float:
        """Count images against the key's rate; 0 when it allows them, or else in how many seconds it will.

        A key may save up one minute's images. Each ingress process counts for itself.
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


# -- the command -------------------------------------------------------------------------------------------------------


def folder_of(store: str, keys: str | None) -> KeyFolder:
    """The folder that is named, or the store's own."""
    return KeyFolder(Location.of(keys) if keys else Location.of(store) / "keys")


def make(
    store: str,
    tenant: str,
    subjects: tuple[str, ...] = (),
    keys: str | None = None,
    images_per_minute: int | None = None,
    largest_side: int | None = None,
    admin: bool = False,
) -> None:
    """Make a key and print it: it cannot be shown again.

    Args:
        store: The subject store.
        tenant: Whose key it is.
        subjects: The tenant's subjects: names, or patterns such as 'acme-*'.
        keys: The folder of keys, if it is not STORE/keys.
        images_per_minute: The key's rate; without it there is no limit.
        largest_side: The longest side of an image in pixels; without it the model's own limit holds.
        admin: Let it see every subject, and list and revoke keys over HTTP.
    """
    limits = {"images_per_minute": images_per_minute, "largest_side": largest_side}
    for name, value in limits.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")
    if not subjects and not admin:
        raise ValueError("a key without subjects can do nothing: name some with --subjects, or make it --admin")
    secret, _ = folder_of(store, keys).make(tenant, subjects, admin=admin, **limits)
    print(secret)


def show(store: str, keys: str | None = None) -> None:
    """List the keys by id, with what they may do.

    Args:
        store: The subject store.
        keys: The folder of keys, if it is not STORE/keys.
    """
    for key in folder_of(store, keys).all():
        rate = f"{key.images_per_minute} images a minute" if key.images_per_minute else "no rate limit"
        side = f", sides to {key.largest_side}" if key.largest_side else ""
        what = "admin" if key.admin else " ".join(key.subjects)
        print(f"{key.id}  {key.created}  {key.tenant}: {what} ({rate}{side})")


def revoke(store: str, key_id: tyro.conf.Positional[str], keys: str | None = None) -> None:
    """Revoke a key; servers notice within half a minute.

    Args:
        store: The subject store.
        key_id: The id that `list` shows.
        keys: The folder of keys, if it is not STORE/keys.
    """
    folder_of(store, keys).revoke(key_id)


def main() -> None:
    """Run the command line."""
    try:
        tyro.extras.subcommand_cli_from_dict({"make": make, "list": show, "revoke": revoke}, prog="serve.keys")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
