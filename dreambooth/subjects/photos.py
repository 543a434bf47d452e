"""Subjects: the 3-5 photos of one thing, read and checked before anything else, and manifests of many subjects."""

from __future__ import annotations

import hashlib
import posixpath
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pyarrow.fs as pafs
from PIL import Image

from dreambooth.common.images import read_image
from dreambooth.common.location import Location
from dreambooth.subjects.captions import caption_file, read_caption

_IMAGE_FILE = re.compile(
    r"[^.].*\.(avif|bmp|gif|hei[cf]|jfif|jp2|jpe|jpe?g|pbm|pgm|png|ppm|tga|tiff?|webp)", re.DOTALL | re.IGNORECASE
)


@dataclass(frozen=True)
class InstanceImage:
    """One photo of a subject: its original bytes, and its size in pixels as it is seen (EXIF orientation applied)."""

    name: str
    data: bytes
    sha256: str
    width: int
    height: int
    caption: str | None = None
    """The template of its own prompt, where captions were asked for."""

    def pixels(self) -> Image.Image:
        """Decode to RGB."""
        return read_image(self.data, self.name)


@dataclass(frozen=True)
class Subject:
    """A subject with its photos, in natural order of their names.

    `skipped` names the junk that was passed over; `warnings` are texts on what is allowed but may be a mistake.
    """

    name: str
    class_noun: str
    images: tuple[InstanceImage, ...]
    skipped: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def load_subject(
    name: str,
    images: str | Path | Sequence[str | Path],
    class_noun: str,
    *,
    min_side: int = 64,
    captions: bool = False,
) -> Subject:
    """Find, read and check the photos of a subject.

    In folders and globs, what is not an image by its name (hidden files, `Thumbs.db`, sub-folders, notes) is passed
    over and named in `Subject.skipped`. A file that has an image suffix, or is given itself, must be a good image.

    Args:
        name: the subject's name, its key in the store.
        images: one or more of folder, glob (`*`, `?`, `[...]`, folder by folder), file, or URI of any of these that
            pyarrow knows (`s3://`, `gs://`, `file://`).
        class_noun: what kind of thing it is, such as "dog".
        min_side: the least width and height of a photo, in pixels.
        captions: whether each photo has its caption in a text file beside it.

    Raises:
        ValueError: the name or class noun is not valid, there are no images, or some are bad; all bad ones are named.
    """
    check_name(name)
    class_noun = normalize_class_noun(class_noun)
    sources = [images] if isinstance(images, str | Path) else images
    files: dict[str, pafs.FileSystem] = {}
    skipped: list[str] = []
    problems: list[str] = []
    photos: list[InstanceImage] = []
    for source in sources:
        try:
            filesystem, paths, junk = _find_files(str(source))
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        files.update(dict.fromkeys(paths, filesystem))
        skipped.extend(junk)
    for path, filesystem in files.items():
        try:
            photos.append(_read_photo(filesystem, path, min_side, captions))
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n  ".join([f"subject {name!r}: these images cannot be used:", *problems]))
    if not photos:
        passed_over = f" (passed over: {', '.join(skipped)})" if skipped else ""
        where = ", ".join(map(str, sources)) or "an empty list"
        raise ValueError(f"subject {name!r}: no images in {where}{passed_over}; give 3 to 5 photos of the subject")
    if captions:
        read = {caption_file(photo.name) for photo in photos}
        skipped = [name for name in skipped if name not in read]
    photos.sort(key=lambda photo: (natural_order(photo.name), photo.sha256))
    return Subject(name, class_noun, tuple(photos), tuple(skipped), tuple(_warnings(photos)))


def check_name(name: str) -> None:
    """Check that a subject's name can be its key in a store.

    Raises:
        ValueError: it is not 1-63 of a-z, 0-9, '-' and '_' that start with a letter or digit; the text proposes a name.
    """
    if re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}", name):
        return
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9_]+", "-", plain).strip("-_")[:63] or "my-subject"
    raise ValueError(
        f"subject name {name!r} must be 1 to 63 lower-case letters, digits, '-' and '_', the first a letter or digit; "
        f"use {slug!r}"
    )


def normalize_class_noun(class_noun: str) -> str:
    """Return the noun in lower case with single spaces.

    Raises:
        ValueError: it is blank.
    """
    noun = " ".join(class_noun.lower().split())
    if not noun:
        raise ValueError("the class noun is empty; say what kind of thing the subject is, such as 'dog' or 'backpack'")
    return noun


def _find_files(source: str) -> tuple[pafs.FileSystem, list[str], list[str]]:
    """Return the filesystem of a source, the paths of its image files, and the names of the junk among them."""
    place = Location.of(source)
    info = place.filesystem.get_file_info(place.path)
    if info.type == pafs.FileType.File:
        return place.filesystem, [place.path], []
    if info.type == pafs.FileType.Directory:
        found = place.filesystem.get_file_info(pafs.FileSelector(place.path))
    elif wildcard := re.search(r"[*?\[]", place.path):
        folder, _, _ = place.path[: wildcard.start()].rpartition("/")
        found = list(_glob(place.filesystem, folder, place.path[len(folder) :].strip("/").split("/")))
    else:
        raise ValueError(f"{source}: no such file or folder")
    paths = [info.path for info in found if _is_image_file(info)]
    junk = [info.base_name + "/" * (info.type == pafs.FileType.Directory) for info in found if not _is_image_file(info)]
    return place.filesystem, paths, sorted(junk)


def _glob(filesystem: pafs.FileSystem, folder: str, patterns: list[str]) -> Iterator[pafs.FileInfo]:
    pattern, *deeper = patterns
    for info in filesystem.get_file_info(pafs.FileSelector(folder or "/", allow_not_found=True)):
        if not fnmatchcase(info.base_name, pattern):
            continue
        if not deeper:
            yield info
        elif info.type == pafs.FileType.Directory:
            yield from _glob(filesystem, info.path, deeper)


def _is_image_file(info: pafs.FileInfo) -> bool:
    return info.type == pafs.FileType.File and bool(_IMAGE_FILE.fullmatch(info.base_name))


def _read_photo(filesystem: pafs.FileSystem, path: str, min_side: int, captions: bool) -> InstanceImage:
    with filesystem.open_input_stream(path) as stream:
        data = stream.read()
    width, height = read_image(data, path).size
    if min(width, height) < min_side:
        raise ValueError(f"{path}: {width} x {height} pixels is too small; each side needs {min_side} or more")
    caption = read_caption(filesystem, path) if captions else None
    return InstanceImage(posixpath.basename(path), data, hashlib.sha256(data).hexdigest(), width, height, caption)


def natural_order(name: str) -> list[tuple[str, int, str]]:
    """Order "2.jpg" before "10.jpg"."""
    parts = re.findall(r"(\D*)(\d*)", name)
    return [(text.lower(), int(digits or 0), digits) for text, digits in parts]


def _warnings(photos: list[InstanceImage]) -> Iterator[str]:
    if len(photos) < 3:
        yield f"only {len(photos)} image(s); 3 to 5 show the subject better"
    if len(photos) > 50:
        yield f"{len(photos)} images are many for one subject; is this the right folder?"
    first: dict[str, str] = {}
    for photo in photos:
        if photo.sha256 in first:
            yield f"{photo.name} is the same image as {first[photo.sha256]}"
        first.setdefault(photo.sha256, photo.name)
