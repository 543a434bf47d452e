"""Images by URL: unguessable, there until their time is over, gone after it; the same from any process."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dreambooth.common.location import Location
from serve.api.image_files import ImageFiles


class Clock:
    now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


def test_an_image_is_there_until_its_time_is_over(place: Location) -> None:
    clock = Clock()
    one, other = ImageFiles(place, 60, clock), ImageFiles(place, 60, clock)
    name = one.add(b"image")
    clock.now += 30
    later = one.add(b"later")
    assert (other.read(name), other.expires(name)) == (b"image", 1_700_000_060)
    clock.now += 30
    assert (other.read(name), other.expires(name), other.read(later)) == (None, None, b"later")
    assert (other.clear(), one.clear()) == (1, 0)
    assert place.names() == [later]


def test_names_cannot_be_guessed_or_prolonged(tmp_path: Path) -> None:
    files = ImageFiles(Location.of(tmp_path), 60)
    names = {files.add(b"image") for _ in range(100)}
    assert len({name.split("-", 1)[1] for name in names}) == 100
    assert all(re.fullmatch(r"\d{10}-[\w-]{43}\.png", name) for name in names)
    expires, rest = names.pop().split("-", 1)
    assert files.read(f"{int(expires) + 1000}-{rest}") is None


@pytest.mark.parametrize("name", ["", "..", "../secret", "%2e%2e/secret", "9999999999-a.png", "secret"])
def test_no_other_file_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "secret").write_text("secret")
    assert ImageFiles(Location.of(tmp_path / "images"), 60).read(name) is None


def test_clearing_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert ImageFiles(Location.of(tmp_path), 60).clear() == 0
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
