"""Subjects: the 3-5 photos of one thing, read and checked before anything else, and manifests of many subjects."""

from __future__ import annotations

import difflib
import hashlib
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import yaml
from PIL import Image, ImageCms, ImageOps

from dreambooth.captions import caption_file, read_caption
from dreambooth.storage import Location

MAX_PIXELS = 89_478_485
"""The largest image that is decoded: the size from which Pillow warns of a decompression bomb."""

_IMAGE_FILE = re.compile(
    r"[^.].*\.(avif|bmp|gif|hei[cf]|jfif|jp2|jpe|jpe?g|pbm|pgm|png|ppm|tga|tiff?|webp)", re.DOTALL | re.IGNORECASE
)
CLASSES_FILE = "prompts_and_classes.txt"

_SRGB = ImageCms.createProfile("sRGB")
_HEIC_BRANDS = {b"heic", b"heim", b"heis", b"heix", b"hevc", b"hevx", b"mif1", b"msf1"}


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


@dataclass(frozen=True)
class SubjectSpec:
    """What a manifest says of one subject; None and () where it is silent."""

    name: str
    images: tuple[str, ...]
    class_noun: str | None = None
    identifier: str | None = None
    prompts: tuple[str, ...] = ()


def read_image(data: bytes, name: str) -> Image.Image:
    """Decode an image file wholly, to RGB as a viewer shows it.

    EXIF orientation is applied, transparency lies on white, embedded colour profiles are converted to sRGB, 16-bit grey
    is scaled to 8 bits, and a file of several frames gives its first.

    Args:
        data: the bytes of the file.
        name: what errors call it.

    Raises:
        ValueError: the file is empty, no image, truncated, or larger than `MAX_PIXELS`.
    """
    if not data:
        raise ValueError(f"{name}: the file is empty; copy it again or leave it out")
    bomb = f"{name}: more than {MAX_PIXELS / 1e6:.0f} megapixels, which may be a decompression bomb; make it smaller"
    try:
        image = Image.open(BytesIO(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(bomb) from error
    except Exception as error:  # on broken headers Pillow's plugins raise nearly anything
        if data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS:
            raise ValueError(f"{name}: HEIC images cannot be read here; convert it to JPEG or PNG") from error
        raise ValueError(
            f"{name}: not an image, or of a kind that cannot be read; convert it to JPEG or PNG"
        ) from error
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(bomb)
    try:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # as do its decoders
        raise ValueError(f"{name}: truncated or corrupt ({error}); copy it again or leave it out") from error


def png_bytes(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


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
    photos.sort(key=lambda photo: (_natural(photo.name), photo.sha256))
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


def load_manifest(source: str | Path) -> list[SubjectSpec]:
    """Read a manifest of subjects: a YAML file, or a folder that holds one folder of images per subject.

    The YAML file is a mapping with one key, `subjects`: a list of mappings with the fields of `SubjectSpec`, where
    relative `images` are taken from the manifest's own folder. In a folder, class nouns come from DreamBench's
    `prompts_and_classes.txt`, there or one level up; a subject that it does not list has none.

    Args:
        source: a path or URI.

    Raises:
        ValueError: it cannot be read, names an unknown key, lacks a needed one, or holds no or two equal names.
    """
    place = Location.of(source)
    try:
        if place.is_folder():
            specs = _folder_specs(place)
        elif place.exists():
            specs = _yaml_specs(place)
        else:
            raise ValueError("no such file or folder")
        if not specs:
            raise ValueError("it holds no subjects")
        for spec in specs:
            check_name(spec.name)
        if repeated := [name for name, count in Counter(spec.name for spec in specs).items() if count > 1]:
            raise ValueError(f"subject names must differ, and these do not: {', '.join(repeated)}")
    except (ValueError, OSError) as error:
        raise ValueError(f"manifest {source}: {error}") from error
    return specs


def parse_classes(text: str) -> dict[str, str]:
    """Return {subject name: class noun} from the text of DreamBench's `prompts_and_classes.txt`."""
    rows = re.split(r"^Prompts\s*$", text, maxsplit=1, flags=re.MULTILINE)[0].splitlines()
    pairs = (row.split(",", 1) for row in rows if "," in row and row.strip() != "subject_name,class")
    return {name.strip(): normalize_class_noun(noun) for name, noun in pairs}


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range; save it with 8 bits per channel")
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    profile = image.info.get("icc_profile")
    if profile and image.mode in ("RGB", "CMYK"):
        try:
            return ImageCms.profileToProfile(image, BytesIO(profile), _SRGB, outputMode="RGB") or image
        except ImageCms.PyCMSError:  # a broken profile: show the image without it, as viewers do
            pass
    return image.convert("RGB")


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


def _natural(name: str) -> list[tuple[str, int, str]]:
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


def _folder_specs(folder: Location) -> list[SubjectSpec]:
    infos = folder.filesystem.get_file_info(pafs.FileSelector(folder.path))
    names = [info.base_name for info in infos if info.type == pafs.FileType.Directory and info.base_name[0] != "."]
    classes: dict[str, str] = {}
    for place in (folder.parent / CLASSES_FILE, folder / CLASSES_FILE):
        if place.exists():
            classes |= parse_classes(place.read_bytes().decode())
    return [SubjectSpec(name, (str(folder / name),), classes.get(name)) for name in sorted(names, key=_natural)]


def _yaml_specs(manifest: Location) -> list[SubjectSpec]:
    try:
        content = yaml.safe_load(manifest.read_bytes())
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError("it must be a mapping with the key 'subjects'")
    _check_keys(content, ["subjects"])
    entries = content.get("subjects") or []
    if not isinstance(entries, list):
        raise ValueError("'subjects' must be a list")
    specs = []
    for number, entry in enumerate(entries, 1):
        try:
            specs.append(_spec(entry, manifest.parent))
        except ValueError as error:
            raise ValueError(f"subject {number}: {error}") from error
    return specs


def _spec(entry: Any, folder: Location) -> SubjectSpec:
    if not isinstance(entry, dict):
        raise ValueError("it must be a mapping with the keys 'name' and 'images'")
    _check_keys(entry, [field.name for field in fields(SubjectSpec)])
    name, noun, identifier = (_text(entry, key) for key in ("name", "class_noun", "identifier"))
    images, prompts = (_texts(entry, key) for key in ("images", "prompts"))
    if not name or not images:
        raise ValueError(f"the key {'images' if name else 'name'!r} is missing or empty")
    places = tuple(image if "://" in image else str(folder / str(Path(image).expanduser())) for image in images)
    return SubjectSpec(name, places, noun if noun is None else normalize_class_noun(noun), identifier, prompts)


def _check_keys(mapping: dict[Any, Any], valid: list[str]) -> None:
    for key in mapping:
        if key not in valid:
            nearest = difflib.get_close_matches(str(key), valid, n=1, cutoff=0)[0]
            raise ValueError(f"unknown key {key!r}; did you mean {nearest!r}?")


def _text(entry: dict[str, Any], key: str) -> str | None:
    value = entry.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key} must be text, not {value!r}; put it in quotes")
    return value


def _texts(entry: dict[str, Any], key: str) -> tuple[str, ...]:
    value = entry.get(key) or []
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
        raise ValueError(f"{key} must be text or a list of texts, not {value!r}")
    return tuple(values)
