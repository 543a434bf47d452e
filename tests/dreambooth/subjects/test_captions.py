"""Captions: one line beside each photo that names the subject."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from dreambooth.common.location import Location
from dreambooth.subjects.photos import load_subject


@pytest.fixture
def folder(photos: Path, tmp_path: Path) -> Path:
    """Three photos with captions."""
    shutil.copytree(photos, tmp_path / "mug")
    for number in range(3):
        (tmp_path / "mug" / f"{number}.txt").write_text(f"a {{subject}} on table {number}\n")
    return tmp_path / "mug"


def test_each_photo_has_the_caption_of_its_name(folder: Path) -> None:
    (folder / "1.txt").write_bytes("\ufeff\n  a {subject} at the café \r\n".encode())
    (folder / "notes.txt").write_text("not beside a photo")
    subject = load_subject("mug", folder, "mug", captions=True)
    captions = [(image.name, image.caption) for image in subject.images]
    assert captions == [
        ("0.png", "a {subject} on table 0"),
        ("1.png", "a {subject} at the café"),
        ("2.png", "a {subject} on table 2"),
    ]
    assert subject.skipped == ("notes.txt",)


def test_captions_are_read_when_asked_for_only(folder: Path) -> None:
    subject = load_subject("mug", folder, "mug")
    assert [image.caption for image in subject.images] == [None] * 3
    assert subject.skipped == ("0.txt", "1.txt", "2.txt")


def test_captions_lie_beside_photos_in_a_bucket_too(folder: Path, bucket: Location) -> None:
    place = bucket / "captioned"
    for path in folder.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    subject = load_subject("mug", str(place), "mug", captions=True)
    assert [image.caption for image in subject.images] == [f"a {{subject}} on table {number}" for number in range(3)]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "0.png: it has no caption; write one to {folder}/0.txt"),
        (b"", "0.txt: a caption is one line of text, and it has 0"),
        (b"a {subject}\non a table", "0.txt: a caption is one line of text, and it has 2"),
        (b"\xff\xfe{\x00", "0.txt: not UTF-8"),
        (b"a mug on a table", "0.txt: the caption 'a mug on a table' does not name {{subject}}"),
    ],
)
def test_a_bad_caption_is_an_error_that_names_the_file(folder: Path, content: bytes | None, says: str) -> None:
    (folder / "0.txt").unlink() if content is None else (folder / "0.txt").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(says.format(folder=folder))):
        load_subject("mug", folder, "mug", captions=True)
