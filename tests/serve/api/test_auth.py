"""Keys: only hashes are stored, limits hold, a revoked key is refused."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dreambooth.common.location import Location
from serve.api.auth import KeyFolder, KeyRing
from serve.catalog import index

pytestmark = pytest.mark.anyio


async def test_only_the_hash_of_a_key_is_stored(place: Location) -> None:
    secret, key = KeyFolder(place).make("acme", ("acme-*",), images_per_minute=3)
    [name] = place.names()
    stored = (place / name).read_bytes().decode()
    assert secret not in name + stored
    assert await KeyRing(place).find(secret) == key
    assert await KeyRing(place).find(secret + "x") is None
    assert KeyFolder(place).all() == [key]


async def test_a_revoked_key_is_refused_without_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_FRESH_SECONDS", 0.05)
    folder = KeyFolder(Location.of(tmp_path))
    secret, key = folder.make("acme", ("rex",))
    ring = KeyRing(folder.folder)
    assert await ring.find(secret)
    other, _ = folder.make("acme", ("rex",))
    folder.revoke(key.id)
    until = time.monotonic() + 5
    while (await ring.find(secret) or not await ring.find(other)) and time.monotonic() < until:
        time.sleep(0.02)
    assert await ring.find(secret) is None
    assert await ring.find(other) is not None
    with pytest.raises(ValueError, match=key.id):
        folder.revoke(key.id)


def test_a_key_sees_the_subjects_of_its_tenant_alone(tmp_path: Path) -> None:
    folder = KeyFolder(Location.of(tmp_path))
    _, key = folder.make("acme", ("rex", "acme-*"))
    assert [name for name in ("rex", "rexx", "acme-1", "acme", "bacme-1", "mug") if key.sees(name)] == ["rex", "acme-1"]
    _, admin = folder.make("us", (), admin=True)
    assert admin.sees("mug")


def test_a_rate_is_kept_and_says_when_to_come_again(tmp_path: Path) -> None:
    now = 0.0
    folder = KeyFolder(Location.of(tmp_path))
    ring = KeyRing(folder.folder, clock=lambda: now)
    _, key = folder.make("acme", ("rex",), images_per_minute=6)
    _, other = folder.make("acme", ("rex",), images_per_minute=6)
    assert [ring.spend(key, 2) for _ in range(4)] == [0, 0, 0, 20]
    assert ring.spend(other, 6) == 0
    now = 19.0
    assert ring.spend(key, 2) == 1
    now = 20.0
    assert ring.spend(key, 2) == 0
    now = 1000.0
    assert [ring.spend(key, 6), ring.spend(key, 1)] == [0, 10]
