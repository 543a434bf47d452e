from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreambooth.common.location import Location, digest
from tests.conftest import ROOT


def make_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


FILES = {"a.txt": b"alpha", "deep/er/b.bin": bytes(range(256)), "deep/empty": b""}


def test_bytes_and_json_come_back(place: Location) -> None:
    (place / "b").write_bytes(b"\x00\xff")
    assert (place / "b").read_bytes() == b"\x00\xff"
    value = {"prompt": "a 犬 dog", "sizes": [1, 2.5, None]}
    (place / "sub/v.json").write_json(value)
    assert (place / "sub/v.json").read_json() == value
    assert "犬" in (place / "sub" / "v.json").read_bytes().decode()


def test_what_is_there_is_told_from_what_is_not(place: Location) -> None:
    assert not place.exists()
    (place / "folder/file").write_bytes(b"1")
    assert [(place / name).exists() for name in ("folder", "folder/file", "file")] == [True, True, False]
    assert [(place / name).is_folder() for name in ("folder", "folder/file", "file")] == [True, False, False]


def test_an_absent_folder_lists_nothing(place: Location) -> None:
    assert (place.names(), place.files()) == ([], {})


def test_listings_are_sorted_and_leave_hidden_files_out(place: Location) -> None:
    for name in ("b", "a/2", "a/1", ".hidden", "a/.b.0123abcd"):
        (place / name).write_bytes(name.encode())
    assert place.names() == ["a", "b"]
    assert place.files() == {"a/1": 3, "a/2": 3, "b": 1}


def test_folders_go_up_and_down_unchanged(place: Location, tmp_path: Path) -> None:
    (place / "set").upload(make_folder(tmp_path / "up", FILES))
    assert (place / "set").files() == {name: len(data) for name, data in FILES.items()}
    (place / "set").download(tmp_path / "down")
    assert {name: (tmp_path / "down" / name).read_bytes() for name in FILES} == FILES


def test_a_file_is_replaced_as_a_whole(place: Location, tmp_path: Path) -> None:
    (place / "f").write_bytes(b"a long first text")
    (place / "f").write_bytes(b"short")
    assert (place / "f").read_bytes() == b"short"
    (tmp_path / "third").write_bytes(b"third")
    (place / "f").upload_file(tmp_path / "third")
    assert (place / "f").read_bytes() == b"third"
    assert place.files() == {"f": 5}


def test_a_write_that_raises_leaves_no_file(place: Location, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        (place / "f").write_bytes("text")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        (place / "f").write_json({"a set": {1}})
    with pytest.raises(OSError, match="absent"):
        (place / "f").upload_file(tmp_path / "absent")
    assert place.files() == {}
    assert place.local is None or [path for path in place.local.rglob("*") if path.is_file()] == []


def test_a_write_that_raises_keeps_the_file_that_was_there(place: Location, tmp_path: Path) -> None:
    (place / "f").write_bytes(b"first")
    with pytest.raises(TypeError):
        (place / "f").write_bytes("text")  # type: ignore[arg-type]
    with pytest.raises(OSError, match="absent"):
        (place / "f").upload_file(tmp_path / "absent")
    assert (place / "f").read_bytes() == b"first"


def test_a_file_that_cannot_be_moved_into_place_leaves_no_other(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError):
        Location.of(tmp_path / "taken").write_bytes(b"1")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


READER = """
import sys
from dreambooth.common.location import Location
place = Location(sys.argv[1])
while (text := place.read_bytes()) != b"end":
    assert len(text) == 300_000 and len(set(text)) == 1, f"a part of a file: {len(text)} bytes"
    print("read", flush=True)
"""


@pytest.mark.long
def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    file = Location.of(tmp_path / "f")
    file.write_bytes(b"0" * 300_000)
    reader = subprocess.Popen([sys.executable, "-c", READER, file.uri], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert reader.stdout is not None
    reader.stdout.readline()
    for number in range(40):
        file.write_bytes(str(number % 10).encode() * 300_000)
    file.write_bytes(b"end")
    reader.communicate(timeout=60)
    assert reader.returncode == 0


def test_sha256_is_that_of_the_bytes(place: Location) -> None:
    data = bytes(range(256)) * 20_000  # more than one piece
    (place / "f").write_bytes(data)
    assert (place / "f").sha256() == hashlib.sha256(data).hexdigest()


def test_deleting_takes_the_folder_and_all_in_it(place: Location) -> None:
    (place / "a/b/c").write_bytes(b"1")
    (place / "ab").write_bytes(b"2")
    (place / "a").delete()
    (place / "never there").delete()
    assert place.files() == {"ab": 1}
    assert not (place / "a").exists()


def test_names_with_spaces_and_signs_are_names(place: Location) -> None:
    names = ["a b.txt", "50%.txt", "50%25.txt", "#1", "why?", "a+b&c=d", "Hündchen/犬.png", "[x] *"]
    for name in names:
        (place / name).write_bytes(name.encode())
    assert list(place.files()) == sorted(names)
    for name in names:
        assert (place / name).read_bytes() == name.encode()
        assert (place / name).name == name.split("/")[-1]
        assert (place / name).parent.exists()


@pytest.mark.long
def test_locations_pickle_after_use_and_open_their_own_connection(place: Location) -> None:
    file = place / "f"
    file.write_bytes(b"here")
    program = "import pickle, sys; print(pickle.loads(sys.stdin.buffer.read()).read_bytes().decode())"
    output = subprocess.run(
        [sys.executable, "-c", program], input=pickle.dumps(file), cwd=ROOT, capture_output=True, check=True
    )
    assert output.stdout == b"here\n"
    assert pickle.loads(pickle.dumps(file)) == file
    assert len(pickle.dumps(file)) < 400


@pytest.mark.parametrize(
    ("uri", "joined", "parent"),
    [
        ("/data/store", "/data/store/x/y", "/data"),
        ("file:///data/store", "file:///data/store/x/y", "file:///data"),
        ("s3://bucket", "s3://bucket/x/y", "s3://bucket"),
        ("s3://bucket/a/b/", "s3://bucket/a/b/x/y", "s3://bucket/a"),
        (
            "s3://bucket/a?region=r&scheme=http",
            "s3://bucket/a/x/y?region=r&scheme=http",
            "s3://bucket/?region=r&scheme=http",
        ),
    ],
)
def test_joins_and_parents_keep_the_query(uri: str, joined: str, parent: str) -> None:
    place = Location(uri)
    assert str(place / "x/y") == str(place / "x" / "y") == joined
    assert str(place.parent) == parent
    assert str((place / "x/y").parent) == str(place / "x")


def test_relative_paths_and_the_home_folder_are_resolved_when_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert Location.of("store").uri == f"{tmp_path}/store"
    assert Location.of("~/store").uri == "/home/someone/store"
    assert Location.of(Path("store")) == Location.of(Location.of("store"))


def test_only_this_machines_places_are_local(tmp_path: Path, bucket: Location) -> None:
    assert Location.of(tmp_path / "a b").local == tmp_path / "a b"
    assert Location.of(f"file://{tmp_path}/a b").local == tmp_path / "a b"
    assert (bucket / "a").local is None


@pytest.mark.parametrize("uri", ["ftp://host/x", "://x"])
def test_a_uri_that_cannot_be_used_is_named(uri: str) -> None:
    with pytest.raises(ValueError, match=f"cannot use '{uri}' as a path or URI"):
        Location.of(uri).exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(JSON, JSON)
def test_digests_tell_values_apart(value: object, other: object) -> None:
    same = json.dumps(value, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (digest(value) == digest(other)) is same


def test_digests_keep_their_values_and_ignore_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [2, "é"]}) == digest({"b": [2, "é"], "a": 1})
    assert digest({"a": 1, "b": [2, "é"]}, 16) == "992f8d0a5d6192a6"
