"""Methods: what is trained of a backbone, and how."""

from __future__ import annotations

import difflib

from dreambooth.methods.base import Method
from dreambooth.methods.dreambooth import DreamBooth
from dreambooth.methods.textual_inversion import TextualInversion

METHODS: dict[str, Method] = {method.name: method for method in (DreamBooth(), TextualInversion())}
"""Methods by name. A new one is a file of its own and a name here."""

__all__ = ["METHODS", "Method", "find_method"]


def find_method(name: str) -> Method:
    """The method of this name; ValueError, naming the nearest, when there is none."""
    if name not in METHODS:
        nearest = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.0)[0]
        raise ValueError(f"--method {name} is not known: the nearest is {nearest!r} of {', '.join(METHODS)}")
    return METHODS[name]
