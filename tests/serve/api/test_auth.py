"""Keys: only hashes are stored, limits hold, a revoked key is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dreambooth.common.location import Location
from serve.api.auth import KeyFolder, KeyRing
from serve.catalog import index
from tests.conftest import ROOT

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


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "serve.keys", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


async def test_the_command_makes_lists_and_revokes(tmp_path: Path) -> None:
    made = run("make", "--store", str(tmp_path), "--tenant", "acme", "--subjects", "rex", "--images-per-minute", "9")
    secret = made.stdout.strip()
    key = await KeyRing(Location.of(tmp_path / "keys")).find(secret)
    assert key is not None, made.stderr
    assert (key.tenant, key.subjects, key.images_per_minute, key.admin) == ("acme", ("rex",), 9, False)
    listed = run("list", "--store", str(tmp_path)).stdout
    assert key.id in listed
    assert secret not in listed
    assert run("revoke", key.id, "--store", str(tmp_path)).returncode == 0
    again = run("revoke", key.id, "--store", str(tmp_path))
    assert (again.returncode, again.stderr.startswith("error: there is no key")) == (2, True)
