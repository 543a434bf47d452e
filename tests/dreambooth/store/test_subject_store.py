"""The subject store, on a disk and in an object store; and publishing that is killed."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from dreambooth.backbones import open_backbone
from dreambooth.common.location import Location
from dreambooth.store import SubjectStore, Version, subject_store
from tests.conftest import ROOT

FILES = {"unet/config.json": b"{}", "unet/weights.safetensors": bytes(range(256)) * 64, "samples/00.png": b"picture"}
LINEAGE = {"identifier": "sks", "backbone": {"family": "sdxl", "hash": "0f"}}


@pytest.fixture
def store(place: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SubjectStore:
    """An empty store, and an empty cache of this machine."""
    monkeypatch.setattr(subject_store, "_CACHE", tmp_path / "cache")
    return SubjectStore(place)


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A folder to publish."""
    for name, data in FILES.items():
        (tmp_path / "finished" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "finished" / name).write_bytes(data)
    return tmp_path / "finished"


def check_whole(version: Version) -> None:
    """Every file that the manifest lists is there with its size and hash, and no other."""
    there = version.location.files()
    assert there.pop("manifest.json")
    assert there == {name: entry["size"] for name, entry in version.manifest["files"].items()}
    for name, entry in version.manifest["files"].items():
        assert (version.location / name).sha256() == entry["sha256"]


# -- versions ----------------------------------------------------------------------------------------------------------


def test_a_published_version_is_whole_and_says_where_it_comes_from(store: SubjectStore, finished: Path) -> None:
    assert store.version("rex", "v1") is None
    version = store.publish("rex", "v1", finished, LINEAGE, ["unet", "text_encoder"])
    check_whole(version)
    assert store.version("rex", "v1") == version
    assert (version.subject, version.id, version.components) == ("rex", "v1", ["text_encoder", "unet"])
    assert version.manifest["files"].keys() == FILES.keys()
    assert version.manifest["files"]["samples/00.png"]["sha256"] == hashlib.sha256(b"picture").hexdigest()
    assert LINEAGE.items() <= version.manifest.items()
    assert store.subjects() == ["rex"]


def test_publishing_again_changes_nothing(store: SubjectStore, finished: Path) -> None:
    version = store.publish("rex", "v1", finished, LINEAGE, ["unet"])
    (finished / "unet/config.json").write_bytes(b"something else")
    assert store.publish("rex", "v1", finished, {"identifier": "other"}, ["unet"]) == version
    assert store.version("rex", "v1") == version
    check_whole(version)


def test_versions_are_listed_oldest_first_without_unfinished_ones(store: SubjectStore, finished: Path) -> None:
    published = [store.publish("rex", name, finished, LINEAGE, ["unet"]) for name in ("c", "a", "b")]
    store.version_location("rex", "unfinished").upload(finished)
    assert sorted(published, key=lambda version: (version.created, version.id)) == store.versions("rex")
    times = [version.created for version in store.versions("rex")]
    assert times == sorted(times)
    assert store.version("rex", "unfinished") is None
    assert store.versions("max") == []


def test_a_file_that_reads_back_otherwise_is_not_published(
    store: SubjectStore, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = Location.upload

    def upload_and_damage(location: Location, folder: Path) -> None:
        upload(location, folder)
        data = (location / "unet/weights.safetensors").read_bytes()
        (location / "unet/weights.safetensors").write_bytes(data[:-1] + b"\x00")

    with monkeypatch.context() as patch:
        patch.setattr(Location, "upload", upload_and_damage)
        with pytest.raises(OSError, match=r"unet/weights\.safetensors.* differs .* the version is not published"):
            store.publish("rex", "v1", finished, LINEAGE, ["unet"])
    assert store.version("rex", "v1") is None
    check_whole(store.publish("rex", "v1", finished, LINEAGE, ["unet"]))


PUBLISHER = """
import os, signal, sys, time
from pathlib import Path
from dreambooth.store import SubjectStore

uri, folder, trials = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])

def publish(version):
    SubjectStore(uri).publish("rex", version, folder, {}, ["unet"])

def kill_after(seconds, version):
    child = os.fork()
    if child == 0:
        publish(version)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)

start = time.monotonic()
kill_after(None, "undisturbed")
lasts = time.monotonic() - start
for trial in range(trials):
    kill_after(lasts * trial / trials, f"trial-{trial}")
"""


@pytest.mark.long
def test_publishing_killed_at_any_moment_leaves_a_whole_version_or_none(store: SubjectStore, tmp_path: Path) -> None:
    folder = tmp_path / "large"
    trials, files = (20, 30) if store.root.local else (8, 10)  # every request to the S3 server takes its time
    for number in range(files):
        (folder / f"part{number % 3}").mkdir(parents=True, exist_ok=True)
        (folder / f"part{number % 3}" / f"{number}.bin").write_bytes(bytes([number]) * 200_000)
    subprocess.run([sys.executable, "-c", PUBLISHER, store.root.uri, folder, str(trials)], cwd=ROOT, check=True)
    published = [store.version("rex", name) for name in ("undisturbed", *(f"trial-{n}" for n in range(trials)))]
    assert published[0] is not None
    assert published[1] is None  # killed at once
    for version in published:
        if version is not None:
            check_whole(version)
            assert len(version.manifest["files"]) == files
    # Going on after a kill ends in a whole version: what the dead one left, even a part of a file, is written anew.
    for trial in range(0, trials, 5):
        check_whole(store.publish("rex", f"trial-{trial}", folder, {}, ["unet"]))


def test_a_version_is_downloaded_once_when_the_store_is_remote(store: SubjectStore, finished: Path) -> None:
    version = store.publish("rex", "v1", finished, LINEAGE, ["unet"])
    folder = store.local_version(version)
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    (version.location / "unet/config.json").write_bytes(b"changed")  # a second download would bring this
    assert store.local_version(version) == folder
    assert (folder / "unet/config.json").read_bytes() == (b"{}" if store.root.local is None else b"changed")


def test_downloads_of_one_name_are_kept_apart(store: SubjectStore, finished: Path) -> None:
    first = store.publish("rex", "v1.0", finished, LINEAGE, ["unet"])
    (finished / "unet/config.json").write_bytes(b"another's")
    second = store.publish("max", "v1.0", finished, LINEAGE, ["unet"])
    assert (store.local_version(first) / "unet/config.json").read_bytes() == b"{}"
    assert (store.local_version(second) / "unet/config.json").read_bytes() == b"another's"


def test_a_version_that_is_not_there_cannot_be_opened(store: SubjectStore, finished: Path) -> None:
    location = store.version_location("rex", "v1")
    location.upload(finished)
    with pytest.raises(ValueError, match=r"there is no .*rex/versions/v1"):
        store.local_version(Version("rex", "v1", location, {}))


# -- identifiers -------------------------------------------------------------------------------------------------------


def test_identifiers_are_kept_by_subject(store: SubjectStore) -> None:
    assert (store.identifier("rex"), store.identifiers()) == (None, set())
    store.claim_identifier("rex", "sks")
    store.claim_identifier("max", "zwx")
    store.claim_identifier("max", "phy")
    store.version_location("bag", "v1").upload(ROOT / "dreambooth" / "backbones")  # a subject without an identifier
    assert store.identifier("rex") == "sks"
    assert store.identifiers() == {"sks", "phy"}
    assert store.identifiers(besides="max") == {"sks"}
    assert store.subjects() == ["bag", "max", "rex"]


# -- backbones ---------------------------------------------------------------------------------------------------------


def test_a_stored_backbone_opens_as_the_same_backbone(store: SubjectStore, small_sdxl: Path) -> None:
    backbone = open_backbone(small_sdxl)
    location = store.add_backbone(backbone)
    assert {**backbone.files, "backbone.json": 0}.keys() == location.files().keys()
    opened = store.open_backbone(backbone.hash)
    assert (opened.family, opened.hash) == (backbone.family, backbone.hash)


def test_a_backbone_is_stored_once(store: SubjectStore, small_sdxl: Path) -> None:
    backbone = open_backbone(small_sdxl)
    location = store.add_backbone(backbone)
    (location / "vae/config.json").write_bytes(b"a second copy would replace this")
    assert store.add_backbone(backbone) == location
    assert (location / "vae/config.json").read_bytes() == b"a second copy would replace this"


def test_a_backbone_is_downloaded_once_a_machine(
    bucket: Location, tmp_path: Path, small_sdxl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject_store, "_CACHE", tmp_path / "cache")
    store = SubjectStore(bucket / tmp_path.name)
    backbone = open_backbone(small_sdxl)
    location = store.add_backbone(backbone)
    first = store.open_backbone(backbone.hash)
    assert tmp_path in first.folder.parents
    for name in backbone.files:
        (location / name).filesystem.delete_file((location / name).path)
    second = SubjectStore(store.root).open_backbone(backbone.hash)
    assert second.folder == first.folder
    assert second.hash == backbone.hash


def test_a_backbone_whose_upload_did_not_end_is_not_there(store: SubjectStore, small_sdxl: Path) -> None:
    backbone = open_backbone(small_sdxl)
    location = store.root / "backbones" / backbone.hash
    (location / "unet").upload(backbone.folder / "unet")
    with pytest.raises(ValueError, match=f"there is no .*backbones/{backbone.hash}"):
        store.open_backbone(backbone.hash)
    store.add_backbone(backbone)
    assert store.open_backbone(backbone.hash).hash == backbone.hash


# -- the place ---------------------------------------------------------------------------------------------------------


def test_checking_leaves_no_file(store: SubjectStore) -> None:
    store.check_writable()
    assert store.root.files() == {}


def test_a_store_that_cannot_be_written_is_named(tmp_path: Path, bucket: Location) -> None:
    (tmp_path / "file").write_bytes(b"")
    for uri in (str(tmp_path / "file"), bucket.uri.replace("s3://bucket", "s3://no-such-bucket/store")):
        with pytest.raises(ValueError, match=r"store .*(file|no-such-bucket/store).* cannot be written"):
            SubjectStore(uri).check_writable()


def test_free_space_is_that_of_the_disk(store: SubjectStore) -> None:
    free = store.free_bytes()
    assert (free is None) is (store.root.local is None)
    assert free is None or free > 0


def test_a_manifest_is_json_that_people_can_read(store: SubjectStore, finished: Path) -> None:
    version = store.publish("rex", "v1", finished, {"instance_prompt": "a sks 犬"}, ["unet"])
    text = (version.location / "manifest.json").read_bytes().decode()
    assert '  "instance_prompt": "a sks 犬",\n' in text
    assert json.loads(text) == version.manifest
