"""Which models there are."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dreambooth.store import SubjectStore, Version
from serve.index import Index


class Catalog:
    """The store's published versions on some backbones.

    Models are looked up here, so that an id that nobody published costs a dictionary lookup and reaches no replica.
    """

    def __init__(self, store: SubjectStore, backbones: Collection[str]) -> None:
        """Nothing is read before the first question."""
        self._store, self._backbones = store, backbones
        self._index = Index(store.root / "subjects", r"[^/]+/versions/[^/]+/manifest\.json")
        self._entries: Mapping[str, Any] | None = None
        self._versions: dict[str, list[Version]] = {}

    async def versions(self) -> Mapping[str, list[Version]]:
        """The versions of each subject, oldest first; subjects without any are left out."""
        entries = await self._index.entries()
        if entries is not self._entries:
            self._entries, self._versions = entries, self._sorted(entries.values())
        return self._versions

    def _sorted(self, manifests: Collection[dict[str, Any]]) -> dict[str, list[Version]]:
        found: dict[str, list[Version]] = {}
        for manifest in sorted(manifests, key=lambda one: (one["subject"], one["created"], one["version"])):
            if manifest["backbone"]["hash"] in self._backbones:
                subject, version = manifest["subject"], manifest["version"]
                location = self._store.version_location(subject, version)
                found.setdefault(subject, []).append(Version(subject, version, location, manifest))
        return found

    async def find(self, model: str) -> Version | None:
        """The version that `subject` or `subject@version` names."""
        subject, _, wanted = model.partition("@")
        published = (await self.versions()).get(subject, [])
        if published and "@" not in model:
            return published[-1]
        return next((version for version in published if version.id == wanted), None)
