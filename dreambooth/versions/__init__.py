"""Version forms: what a version holds, and how it is saved, loaded, drawn with and swapped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dreambooth.methods.textual_inversion import LEARNED_EMBEDS
from dreambooth.versions.base import VersionForm
from dreambooth.versions.components import Components
from dreambooth.versions.learned_embeds import LearnedEmbeddings

FORMS: dict[str, VersionForm] = {form.name: form for form in (Components(), LearnedEmbeddings())}
"""Forms by name. A new one is a file of its own and a name here."""

__all__ = ["FORMS", "VersionForm", "form_of"]


def form_of(manifest: Mapping[str, Any]) -> VersionForm:
    """The form of a version, or of its second stage, by its part of the manifest.

    Versions from before manifests named their form hold learned embeddings or whole components. ValueError when the
    form is not known here.
    """
    name = manifest.get("form")
    if name is None:
        name = LearnedEmbeddings.name if LEARNED_EMBEDS in manifest["components"] else Components.name
    if name not in FORMS:
        raise ValueError(f"its form is {name!r}, and {', '.join(FORMS)} are known here")
    return FORMS[name]
