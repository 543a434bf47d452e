"""The published versions of a store, and which of them can be served."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dreambooth.backbones import FAMILIES
from dreambooth.sampling.sampler import SamplerSettings
from dreambooth.store import SubjectStore
from dreambooth.versions import form_of
from serve.catalog.index import Index

_FORMAT = 1
_SERVED = {family.family: family for family in FAMILIES if family.latents_kind.networks}
"""The families that are served: the swap pipeline decodes latents."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A published version: the part of its manifest that answers need."""

    subject: str
    version: str
    created: str
    """ISO 8601, UTC."""
    backbone: str
    """Hash of its backbone."""
    identifier: str
    phrase: str
    """The words that replace `{subject}` in a prompt."""
    samples: SamplerSettings
    """The sampler settings of the samples that were published with it: the defaults of requests."""
    unserved: str | None
    """Why the version cannot be served; None when it can."""


def entry_of(manifest: Mapping[str, Any]) -> Entry:
    """The entry for a manifest; KeyError or TypeError when the manifest is malformed."""
    return Entry(
        subject=manifest["subject"],
        version=manifest["version"],
        created=manifest["created"],
        backbone=manifest["backbone"]["hash"],
        identifier=manifest["identifier"],
        phrase=manifest["phrase"],
        samples=SamplerSettings(**manifest["run"]["samples"]),
        unserved=why_unserved(manifest),
    )


def why_unserved(manifest: Mapping[str, Any]) -> str | None:
    """Why this server would draw wrong images of a version; None when it draws the right ones."""
    family, components = manifest["backbone"]["family"], manifest["components"]
    if manifest["format"] != _FORMAT:
        return f"its format is {manifest['format']}, and this server reads format {_FORMAT}"
    if family not in _SERVED:
        return f"its backbone is of the family {family}, which is not served yet"
    try:
        form = form_of(manifest)
    except ValueError as error:
        return str(error)
    if unknown := sorted(set(components) - form.components(_SERVED[family])):
        return f"it holds {', '.join(unknown)}, which this server does not know"
    return None


class Catalog:
    """The published versions of a store, in memory: an unknown model costs one lookup here and reaches no replica."""

    def __init__(self, store: SubjectStore, backbones: Collection[str] | None = None) -> None:
        """Read nothing before the first query. With `backbones` (hashes), versions of others are not served."""
        self._store, self._backbones = store, backbones
        self._index = Index(store.root / "subjects", r"[^/]+/versions/[^/]+/manifest\.json", self._keep)
        self._entries: Mapping[str, Entry] | None = None
        self._versions: dict[str, list[Entry]] = {}

    def _keep(self, manifest: Any) -> Entry:
        entry = entry_of(manifest)
        if entry.unserved is None and self._backbones is not None and entry.backbone not in self._backbones:
            return replace(entry, unserved="the server was started before its backbone came: deploy it again")
        return entry

    async def versions(self) -> Mapping[str, list[Entry]]:
        """The versions of each subject, oldest first; a subject without versions is left out."""
        entries = await self._index.entries()
        if entries is not self._entries:
            found: dict[str, list[Entry]] = {}
            for entry in sorted(entries.values(), key=lambda one: (one.subject, one.created, one.version)):
                found.setdefault(entry.subject, []).append(entry)
            self._entries, self._versions = entries, found
        return self._versions

    async def find(self, model: str) -> Entry | None:
        """The version that `subject` (its newest) or `subject@version` names; None when there is none."""
        subject, _, wanted = model.partition("@")
        published = (await self.versions()).get(subject, [])
        if published and "@" not in model:
            return published[-1]
        return next((entry for entry in published if entry.version == wanted), None)

    async def manifest(self, entry: Entry) -> dict[str, Any]:
        """Read the whole manifest of a version from the store."""
        location = self._store.version_location(entry.subject, entry.version) / "manifest.json"
        return await asyncio.to_thread(location.read_json)

    async def scores(self, entry: Entry) -> list[dict[str, Any]]:
        """Read the score records of a version from the store."""
        return await asyncio.to_thread(self._store.scores, entry.subject, entry.version)
