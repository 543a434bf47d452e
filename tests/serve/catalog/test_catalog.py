"""The catalog: small in memory, with a reason for each version that cannot be served, whatever files there are."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dreambooth.backbones import open_backbone
from dreambooth.common.location import Location
from dreambooth.store import SubjectStore, Version
from serve.catalog import index
from serve.catalog.catalog import Catalog, why_unserved
from serve.catalog.index import Index
from tests.serve.published import DOG, MUG, publish

pytestmark = pytest.mark.anyio


def changed(manifest: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    return {**manifest, **changes}


async def test_a_subject_is_its_newest_version(store: SubjectStore, versions: list[Version]) -> None:
    catalog = Catalog(store)
    found = await catalog.find("mug")
    assert found is not None
    assert (found.subject, found.version) == MUG
    assert await catalog.find("cat") is None
    assert await catalog.manifest(found) == versions[1].manifest


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"components": ["lora"]}, "lora"),
        ({"components": ["text_encoder", "adapter", "unet"]}, "holds adapter"),
        ({"format": 2}, "format"),
        ({"backbone": {"family": "deepfloyd-if", "hash": "0"}}, "deepfloyd-if"),
        ({"backbone": {"family": "flux", "hash": "0"}}, "flux"),
    ],
)
async def test_a_version_that_would_be_drawn_wrongly_is_not_served(
    versions: list[Version], changes: dict[str, Any], reason: str
) -> None:
    assert why_unserved(versions[0].manifest) is None
    assert reason in (why_unserved(changed(versions[0].manifest, **changes)) or "")


async def test_a_backbone_that_no_replica_has_is_not_served(store: SubjectStore, versions: list[Version]) -> None:
    found = await Catalog(store, ["another"]).find("dog")
    assert found is not None
    assert (found.version, "deploy it again" in (found.unserved or "")) == (DOG[1], True)


async def test_a_bad_manifest_leaves_the_other_subjects_alone(small_sdxl: Path, tmp_path: Path) -> None:
    store = SubjectStore(tmp_path)
    published = publish(store, open_backbone(small_sdxl), "mug", "1" * 12, "unet")
    bad = {"broken": "{", "empty": "{}", "list": "[]", "other": json.dumps(changed(published.manifest, run={}))}
    for name, text in bad.items():
        (store.version_location(name, "1") / "manifest.json").write_bytes(text.encode())
    assert list(await Catalog(store).versions()) == ["mug"]


async def test_memory_does_not_grow_with_what_manifests_hold(small_sdxl: Path, tmp_path: Path) -> None:
    store = SubjectStore(tmp_path)
    published = publish(store, open_backbone(small_sdxl), "mug", "1" * 12, "unet")
    large = changed(published.manifest, instance_images=[{"name": "x" * 100}] * 10_000)
    (published.location / "manifest.json").write_json(large)
    entry = await Catalog(store).find("mug")
    assert entry is not None
    sizes = [sys.getsizeof(getattr(entry, name)) for name in entry.__slots__]
    assert sum(sizes) + sys.getsizeof(entry) < 2000
    assert await Catalog(store).manifest(entry) == large


async def test_a_folder_that_disappears_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "_FRESH_SECONDS", 0.0)
    folder = tmp_path / "mounted"
    Location.of(folder / "a.json").write_json({"a": 1})
    mirrored = Index(Location.of(folder), r".*\.json", dict)
    assert await mirrored.entries() == {"a.json": {"a": 1}}
    folder.rename(tmp_path / "elsewhere")
    for _ in range(3):
        assert await mirrored.entries() == {"a.json": {"a": 1}}
        mirrored._thread.submit(lambda: None).result()
    (tmp_path / "elsewhere").rename(folder)
    (folder / "a.json").unlink()
    await mirrored.entries()
    mirrored._thread.submit(lambda: None).result()
    assert await mirrored.entries() == {}
