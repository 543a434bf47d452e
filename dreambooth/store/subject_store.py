"""The subject store: backbones once, and for each subject its identifier and immutable versions.

    STORE/backbones/HASH/...                     base weights; there when HASH/backbone.json is
    STORE/priors/KEY/NNNNNN.parquet              class-prior sets, shared by all subjects of a class, and a preview.png
    STORE/subjects/NAME/subject.json             the subject's identifier, kept across versions
    STORE/subjects/NAME/versions/ID/...          what changed against the backbone; there when ID/manifest.json is
    STORE/subjects/NAME/scores/ID/KEY.json       what judges say of a version
    STORE/evaluations/KEY/NNNNNN.parquet         the pictures that they saw, and a contact_sheet.png
    STORE/runs/KEY/...                           work in progress: checkpoints, TensorBoard events
    STORE/keys/HASH.json                         what a key of the server may do (serve/api/auth.py)

A version or backbone exists exactly when its JSON file does. That file is written last and atomically, and lists every
other file with its size and SHA-256, so whatever is killed when, a reader sees all of it or none. This needs no rename
and no lock, so a disk and an object store behave alike.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Collection
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from dreambooth.backbones import Backbone, open_backbone
from dreambooth.common.location import Location, digest

_CACHE = Path("~/.cache/dreambooth").expanduser()


@dataclass(frozen=True)
class Version:
    """A published version: where it is, and its manifest (lineage and files)."""

    subject: str
    id: str
    location: Location
    manifest: dict[str, Any]

    @property
    def created(self) -> str:
        """When it was published, ISO 8601 in UTC."""
        return self.manifest["created"]

    @property
    def components(self) -> list[str]:
        """The parts of the backbone that the version holds, for example `["unet"]`."""
        return self.manifest["components"]


@dataclass(frozen=True)
class FileEntry:
    """A file of a version."""

    size: int
    sha256: str


class SubjectStore:
    """A subject store at a path or URI. Holds no state of its own: any number of processes may use one store."""

    def __init__(self, uri: str | Path | Location) -> None:
        """Name the store; nothing is read or written yet."""
        self.root = Location.of(uri)

    def __repr__(self) -> str:
        """The store's URI."""
        return f"SubjectStore({self.root.uri!r})"

    def check_writable(self) -> None:
        """Write and remove a small file; raises ValueError when that fails."""
        probe = self.root / "runs" / f"probe-{uuid.uuid4().hex}"
        try:
            probe.write_bytes(b"writable?")
            probe.filesystem.delete_file(probe.path)
        except OSError as error:
            raise ValueError(f"store {self.root} cannot be written: {error}") from error

    def free_bytes(self) -> int | None:
        """Free space where the store is or will be; None when it cannot be told (an object store)."""
        folder = self.root.local
        if folder is None:
            return None
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    # -- backbones -----------------------------------------------------------------------------------------------------

    def add_backbone(self, backbone: Backbone) -> Location:
        """Copy the backbone's files into the store unless they are there."""
        location = self.root / "backbones" / backbone.hash
        marker = location / "backbone.json"
        if not marker.exists():
            for name in backbone.files:
                (location / name).upload_file(backbone.folder / name)
            marker.write_json({"family": backbone.family, "source": backbone.source, "files": backbone.files})
        return location

    def open_backbone(self, backbone_hash: str) -> Backbone:
        """Open a stored backbone on this machine; a remote store's is downloaded once a machine and kept."""
        return open_backbone(self.local_copy(self.root / "backbones" / backbone_hash, "backbone.json"))

    def local_copy(self, location: Location, marker: str) -> Path:
        """A local folder with the files of an immutable `location`, downloaded once a machine when it is remote."""
        if not (location / marker).exists():
            raise ValueError(f"there is no {location}")
        if location.local is not None:
            return location.local
        folder = _CACHE / f"{location.name}-{digest(location.uri, 16)}"
        _CACHE.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                partial = folder.with_name(f"{folder.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                location.download(partial)
                partial.rename(folder)
        return folder

    # -- subjects ------------------------------------------------------------------------------------------------------

    def subjects(self) -> list[str]:
        """Names of the subjects that have been started or published, sorted."""
        return (self.root / "subjects").names()

    def identifier(self, subject: str) -> str | None:
        """The identifier that the subject holds, or None."""
        claim = self.root / "subjects" / subject / "subject.json"
        return claim.read_json()["identifier"] if claim.exists() else None

    def identifiers(self, besides: str | None = None) -> set[str]:
        """The identifiers held by subjects, but for the subject `besides`."""
        held = (self.identifier(subject) for subject in self.subjects() if subject != besides)
        return {text for text in held if text is not None}

    def claim_identifier(self, subject: str, identifier: str) -> None:
        """Record the identifier as the subject's."""
        (self.root / "subjects" / subject / "subject.json").write_json({"name": subject, "identifier": identifier})

    # -- versions ------------------------------------------------------------------------------------------------------

    def version_location(self, subject: str, version: str) -> Location:
        """Where the files of a version are, or would be."""
        return self.root / "subjects" / subject / "versions" / version

    def version(self, subject: str, version: str) -> Version | None:
        """A published version, or None."""
        location = self.version_location(subject, version)
        manifest = location / "manifest.json"
        return Version(subject, version, location, manifest.read_json()) if manifest.exists() else None

    def versions(self, subject: str) -> list[Version]:
        """The subject's published versions, oldest first."""
        names = (self.root / "subjects" / subject / "versions").names()
        found = [published for name in names if (published := self.version(subject, name)) is not None]
        return sorted(found, key=lambda published: (published.created, published.id))

    def publish(
        self, subject: str, version: str, folder: Path, lineage: dict[str, Any], components: Collection[str]
    ) -> Version:
        """Copy a finished folder into the store as a version, and make it appear; publishing again changes nothing.

        Every file is read back from the store and its hash compared before the version appears; OSError if one differs.
        """
        if (published := self.version(subject, version)) is not None:
            return published
        location = self.version_location(subject, version)
        location.upload(folder)
        files = {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            entry = FileEntry(path.stat().st_size, Location.of(path).sha256())
            if (location / name).sha256() != entry.sha256:
                raise OSError(f"{location / name} differs from what was written to it; the version is not published")
            files[name] = asdict(entry)
        manifest = {
            "format": 1,
            "subject": subject,
            "version": version,
            "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "components": sorted(components),
            **lineage,
            "files": files,
        }
        (location / "manifest.json").write_json(manifest)
        return Version(subject, version, location, manifest)

    def scores_location(self, subject: str, version: str) -> Location:
        """Where the records of a version's scores are, or would be: a JSON file for each protocol and photos."""
        return self.root / "subjects" / subject / "scores" / version

    def scores(self, subject: str, version: str) -> list[dict[str, Any]]:
        """The records of a version's scores."""
        folder = self.scores_location(subject, version)
        return [(folder / name).read_json() for name in folder.names()]

    def local_version(self, published: Version) -> Path:
        """A local folder with the version's files, downloaded once a machine when the store is remote."""
        return self.local_copy(published.location, "manifest.json")
