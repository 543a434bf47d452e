"""Folders by path or URI: a local disk and an object store behind one small class, over `pyarrow.fs`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import posixpath
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import pyarrow.fs as pafs

_ATOMIC_ON_CLOSE = {"s3", "gcs", "abfs"}  # an object appears whole when its stream is closed, or not at all
_PATH_SIGNS = "/:@!$&'()*+,;=~"  # what the path of a URI may hold besides letters and digits
_URI_SIGNS = _PATH_SIGNS + "%?#[]"


@dataclass(frozen=True)
class Location:
    """A file or folder named by a path or URI (`/data/store`, `s3://bucket/store?region=...`).

    A plain value: it pickles as its URI, and each process opens its own connection.
    """

    uri: str

    @classmethod
    def of(cls, path_or_uri: str | Path | Location) -> Location:
        """Name a place; a relative path is taken from the working directory."""
        if isinstance(path_or_uri, Location):
            return path_or_uri
        text = str(path_or_uri)
        if "://" in text:
            return cls(text)
        return cls(str(Path(text).expanduser().absolute()))

    @cached_property
    def _resolved(self) -> tuple[pafs.FileSystem, str]:
        try:
            return pafs.FileSystem.from_uri(quote(self.uri, safe=_URI_SIGNS) if "://" in self.uri else self.uri)
        except Exception as error:
            raise ValueError(f"cannot use {self.uri!r} as a path or URI: {error}") from error

    @property
    def filesystem(self) -> pafs.FileSystem:
        """The pyarrow filesystem that holds this place."""
        return self._resolved[0]

    @property
    def path(self) -> str:
        """The path within `filesystem`."""
        return self._resolved[1]

    @property
    def name(self) -> str:
        """The last part of the path."""
        return posixpath.basename(self.path.rstrip("/"))

    @property
    def parent(self) -> Location:
        """The folder that holds this place."""
        if "://" not in self.uri:
            return Location(posixpath.dirname(self.uri))
        scheme, netloc, path, query, fragment = urlsplit(self.uri)
        return Location(urlunsplit((scheme, netloc, posixpath.dirname(path.rstrip("/")), query, fragment)))

    @property
    def local(self) -> Path | None:
        """The path on this machine's file tree, or None when it is elsewhere."""
        return Path(self.path) if isinstance(self.filesystem, pafs.LocalFileSystem) else None

    def __truediv__(self, part: str) -> Location:
        """Name something inside this folder."""
        if "://" not in self.uri:
            return Location(posixpath.join(self.uri, part))
        scheme, netloc, path, query, fragment = urlsplit(self.uri)
        path = posixpath.join(path or "/", quote(part, safe=_PATH_SIGNS))
        return Location(urlunsplit((scheme, netloc, path, query, fragment)))

    def __str__(self) -> str:
        """The path or URI, as given."""
        return self.uri

    def __getstate__(self) -> dict[str, str]:
        """Leave open connections behind when pickled."""
        return {"uri": self.uri}

    def __setstate__(self, state: dict[str, str]) -> None:
        """Restore from the URI alone."""
        object.__setattr__(self, "uri", state["uri"])

    def exists(self) -> bool:
        """Whether a file or folder is there."""
        return self.filesystem.get_file_info(self.path).type != pafs.FileType.NotFound

    def is_folder(self) -> bool:
        """Whether a folder is there."""
        return self.filesystem.get_file_info(self.path).type == pafs.FileType.Directory

    def names(self) -> list[str]:
        """The names of the files and folders directly inside, sorted; empty when the folder is not there."""
        infos = self.filesystem.get_file_info(pafs.FileSelector(self.path, allow_not_found=True))
        return sorted(info.base_name for info in infos if not info.base_name.startswith("."))

    def files(self) -> dict[str, int]:
        """All files below, as {path relative to this folder: size in bytes}, sorted."""
        selector = pafs.FileSelector(self.path, recursive=True, allow_not_found=True)
        infos = self.filesystem.get_file_info(selector)
        root = self.path.rstrip("/") + "/"
        found = {info.path.removeprefix(root): info.size for info in infos if info.type == pafs.FileType.File}
        return dict(
            sorted((path, size) for path, size in found.items() if not posixpath.basename(path).startswith("."))
        )

    def read_bytes(self) -> bytes:
        """The whole file."""
        with self.filesystem.open_input_stream(self.path) as stream:
            return stream.read()

    def read_json(self) -> Any:
        """The file, parsed as JSON."""
        return json.loads(self.read_bytes())

    def write_bytes(self, data: bytes) -> None:
        """Write the file atomically: a reader sees the old file, or the new one, never a part.

        A large object is read in pieces: one that is read while it is replaced may come as a mixture of both.
        """
        whole = memoryview(data)  # what is no bytes fails here: an object store would keep an empty object
        with self._replacing() as path, self.filesystem.open_output_stream(path) as stream:
            stream.write(whole)

    def write_json(self, value: Any) -> None:
        """Write `value` as indented JSON, atomically."""
        self.write_bytes((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    @contextlib.contextmanager
    def _replacing(self) -> Iterator[str]:
        folder = posixpath.dirname(self.path)
        if self.filesystem.type_name in _ATOMIC_ON_CLOSE:
            yield self.path
            return
        self.filesystem.create_dir(folder, recursive=True)
        temporary = posixpath.join(folder, f".{self.name}.{uuid.uuid4().hex}")
        try:
            yield temporary
            self.filesystem.move(temporary, self.path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                self.filesystem.delete_file(temporary)
            raise

    def upload_file(self, source: Path) -> None:
        """Copy a local file to this place, atomically."""
        with self._replacing() as path:
            pafs.copy_files(
                str(source.absolute()),
                path,
                source_filesystem=pafs.LocalFileSystem(),
                destination_filesystem=self.filesystem,
            )

    def upload(self, folder: Path) -> None:
        """Copy the files of a local folder into this one, each atomically."""
        for source in sorted(path for path in folder.rglob("*") if path.is_file()):
            (self / source.relative_to(folder).as_posix()).upload_file(source)

    def download(self, folder: Path) -> None:
        """Copy all files below this folder into a local one."""
        folder.mkdir(parents=True, exist_ok=True)
        pafs.copy_files(
            self.path, str(folder), source_filesystem=self.filesystem, destination_filesystem=pafs.LocalFileSystem()
        )

    def delete(self) -> None:
        """Remove the folder and all in it; nothing happens when it is not there."""
        if self.is_folder():
            self.filesystem.delete_dir(self.path)

    def sha256(self) -> str:
        """The hex digest of the file's bytes, read in pieces."""
        digest = hashlib.sha256()
        with self.filesystem.open_input_stream(self.path) as stream:
            while piece := stream.read(1 << 22):
                digest.update(piece)
        return digest.hexdigest()


def digest(value: Any, length: int = 64) -> str:
    """The hex SHA-256 of a JSON-like value, independent of the order of its keys; the first `length` digits."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]
