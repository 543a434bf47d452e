"""Content keys that survive growth: a setting that is added later changes no key while it is at its default."""

from __future__ import annotations

from dataclasses import field, fields, is_dataclass
from typing import Any

_LATER = "added after keys were made"


def later(default: Any) -> Any:
    """A dataclass field that was added after values without it had been hashed: keys leave it out at its default.

    Every new field of a class whose values are hashed must be one.
    """
    return field(default=default, metadata={_LATER: True})


def key_form(value: Any) -> Any:
    """A JSON-like form of dataclasses, mappings and sequences, for hashing; fields made by `later` as they say."""
    if is_dataclass(value) and not isinstance(value, type):
        shown = {one.name: getattr(value, one.name) for one in fields(value) if not _left_out(value, one)}
        return {name: key_form(member) for name, member in shown.items()}
    if isinstance(value, dict):
        return {name: key_form(member) for name, member in value.items()}
    if isinstance(value, list | tuple):
        return [key_form(member) for member in value]
    return value


def _left_out(value: Any, one: Any) -> bool:
    return _LATER in one.metadata and getattr(value, one.name) == one.default
