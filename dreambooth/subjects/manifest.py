"""Manifests of many subjects: a YAML file, or a folder with one folder a subject."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import yaml

from dreambooth.common.location import Location
from dreambooth.subjects.photos import check_name, natural_order, normalize_class_noun

CLASSES_FILE = "prompts_and_classes.txt"


@dataclass(frozen=True)
class SubjectSpec:
    """What a manifest says of one subject; None and () where it is silent."""

    name: str
    images: tuple[str, ...]
    class_noun: str | None = None
    identifier: str | None = None
    prompts: tuple[str, ...] = ()


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


def _folder_specs(folder: Location) -> list[SubjectSpec]:
    infos = folder.filesystem.get_file_info(pafs.FileSelector(folder.path))
    names = [info.base_name for info in infos if info.type == pafs.FileType.Directory and info.base_name[0] != "."]
    classes: dict[str, str] = {}
    for place in (folder.parent / CLASSES_FILE, folder / CLASSES_FILE):
        if place.exists():
            classes |= parse_classes(place.read_bytes().decode())
    return [SubjectSpec(name, (str(folder / name),), classes.get(name)) for name in sorted(names, key=natural_order)]


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
