import re

import pyarrow.fs as pafs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dreambooth.common.location import Location
from dreambooth.subjects.photos import InstanceImage, check_name, load_subject, normalize_class_noun
from tests.photo_files import DREAMBENCH, encoded, fill_folder, gradient, needs_dreambench, photo


def test_a_folder_is_read_in_natural_order_and_junk_is_named(tmp_path):
    folder = fill_folder(tmp_path / "my photos [1]", **{f"{n}__jpg": photo(n) for n in (10, 2, 1)})
    fill_folder(folder, __DS_Store=b"x", Thumbs__db=b"x", desktop__ini=b"x", notes__txt=b"x", _hidden=b"x")
    fill_folder(folder, **{"___4__jpg": b"resource fork"})
    fill_folder(folder / ".ipynb_checkpoints", a__jpg=photo())
    subject = load_subject("rex", folder, "  Golden \t Retriever ")
    assert [image.name for image in subject.images] == ["1.jpg", "2.jpg", "10.jpg"]
    assert subject.class_noun == "golden retriever"
    assert set(subject.skipped) == {
        ".DS_Store", "Thumbs.db", "desktop.ini", "notes.txt", "_hidden", "._4.jpg", ".ipynb_checkpoints/",
    }  # fmt: skip
    assert subject.warnings == ()
    image = subject.images[0]
    assert (image.data, image.width, image.height) == (photo(1), 96, 80)
    assert image.pixels().size == (96, 80)


def test_size_is_taken_after_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    folder = fill_folder(tmp_path, a__jpg=encoded(gradient(100, 70), "JPEG", exif=exif))
    image = load_subject("rex", folder, "dog").images[0]
    assert (image.width, image.height) == (70, 100) == image.pixels().size


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["a"], ["1.jpg", "2.jpg"]),
        (["a/1.jpg"], ["1.jpg"]),
        (["a/*.jpg"], ["1.jpg", "2.jpg"]),
        (["a/[2-9].jp?"], ["2.jpg"]),
        (["*/*.jpg"], ["1.jpg", "2.jpg", "3.jpg"]),
        (["b", "a/2.jpg"], ["2.jpg", "3.jpg"]),
        (["a", "a/*", "a/1.jpg"], ["1.jpg", "2.jpg"]),
        (["a/raw"], ["raw"]),
    ],
)
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_sources_are_folders_globs_files_and_uris(tmp_path, sources, names, scheme):
    if scheme and any(character in sources[0] for character in "?["):
        pytest.skip("in a URI these are not wildcards")
    fill_folder(tmp_path / "a", **{"1__jpg": photo(1), "2__jpg": photo(2)})
    fill_folder(tmp_path / "b", **{"3__jpg": photo(3)})
    if sources == ["a/raw"]:
        fill_folder(tmp_path / "a", raw=photo(4))
    subject = load_subject("rex", [f"{scheme}{tmp_path}/{source}" for source in sources], "dog")
    assert [image.name for image in subject.images] == names


def test_photos_of_an_object_store_are_read(tmp_path, monkeypatch):
    fill_folder(tmp_path / "bucket/rex 1", **{"1__jpg": photo(1), "2 b__jpg": photo(2)})
    store = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    monkeypatch.setattr(Location, "_resolved", property(lambda self: (store, self.uri.removeprefix("s3://"))))
    for source in ("s3://bucket/rex 1", "s3://bucket/rex*/*.jpg"):
        assert [image.name for image in load_subject("rex", source, "dog").images] == ["1.jpg", "2 b.jpg"]


def test_order_depends_on_names_and_bytes_alone(tmp_path):
    one = fill_folder(tmp_path / "one", **{"1__jpg": photo(1), "2__jpg": photo(2)})
    two = fill_folder(tmp_path / "two", **{"1__jpg": photo(3)})
    assert load_subject("rex", [one, two], "dog").images == load_subject("rex", [two, one], "dog").images


def test_all_bad_files_are_named_in_one_error(tmp_path):
    folder = fill_folder(tmp_path, a__jpg=photo(), b__jpg=b"", c__png=b"text", d__jpg=photo()[:-300])
    fill_folder(tmp_path, e__jpg=encoded(Image.new("RGB", (200, 40)), "JPEG"))
    with pytest.raises(ValueError, match="these images cannot be used") as error:
        load_subject("rex", [folder, tmp_path / "missing", "ftp://host/x.jpg"], "dog")
    text = str(error.value)
    for part in ("b.jpg: the file is empty", "c.png: not an image", "d.jpg: truncated", "200 x 40 pixels is too small"):
        assert part in text
    assert f"{tmp_path}/missing: no such file or folder" in text
    assert "ftp://host/x.jpg" in text
    assert "a.jpg" not in text


def test_an_explicit_file_must_be_an_image(tmp_path):
    fill_folder(tmp_path, notes__txt=b"hello")
    with pytest.raises(ValueError, match=r"notes\.txt: not an image"):
        load_subject("rex", tmp_path / "notes.txt", "dog")


def test_the_least_side_is_a_choice(tmp_path):
    fill_folder(tmp_path, a__png=encoded(Image.new("RGB", (32, 40))))
    assert len(load_subject("rex", tmp_path, "dog", min_side=32).images) == 1
    with pytest.raises(ValueError, match=r"a\.png: 32 x 40 pixels is too small; each side needs 33"):
        load_subject("rex", tmp_path, "dog", min_side=33)


@pytest.mark.parametrize("source", ["{}", "{}/*.jpg", []])
def test_no_images_is_an_error_that_names_the_junk(tmp_path, source):
    fill_folder(tmp_path, notes__txt=b"x")
    sources = source.format(tmp_path) if isinstance(source, str) else source
    with pytest.raises(ValueError, match="no images in") as error:
        load_subject("rex", sources, "dog")
    assert ("notes.txt" in str(error.value)) is (source == "{}")


def test_few_many_and_equal_images_are_warnings(tmp_path):
    folder = fill_folder(tmp_path / "few", a__jpg=photo(), b__jpg=photo())
    few, equal = load_subject("rex", folder, "dog").warnings
    assert "only 2 image(s)" in few
    assert equal == "b.jpg is the same image as a.jpg"
    folder = fill_folder(tmp_path / "many", **{f"{n}__jpg": photo(n) for n in range(51)})
    assert "51 images are many" in load_subject("rex", folder, "dog").warnings[0]


@pytest.mark.parametrize(
    ("name", "proposed"),
    [
        ("Rex", "rex"),
        ("my dog", "my-dog"),
        ("Hündchen Nr. 5", "hundchen-nr-5"),
        ("_dog", "dog"),
        ("../../etc", "etc"),
        ("dog\n", "dog"),
        ("犬", "my-subject"),
        ("", "my-subject"),
        ("a" * 64, "a" * 63),
    ],
)
def test_a_bad_name_is_an_error_that_proposes_a_good_one(tmp_path, name, proposed):
    with pytest.raises(ValueError, match=f"use '{proposed}'"):
        load_subject(name, tmp_path, "dog")
    check_name(proposed)


@given(st.text())
def test_the_proposed_name_is_valid(name):
    try:
        check_name(name)
    except ValueError as error:
        check_name(re.search(r"use '(.*)'$", str(error)).group(1))


@pytest.mark.parametrize("noun", ["", "  ", "\t\n"])
def test_an_empty_class_noun_is_an_error(tmp_path, noun):
    with pytest.raises(ValueError, match="class noun is empty"):
        load_subject("rex", tmp_path, noun)


@given(st.text())
def test_class_nouns_have_one_form(noun):
    if noun.split():
        assert normalize_class_noun(normalize_class_noun(noun)) == normalize_class_noun(f" {noun} ")


@needs_dreambench
def test_photos_of_original_size_are_read():
    subject = load_subject("colorful_sneaker", DREAMBENCH / "originals/colorful_sneaker", "sneaker")
    assert all(isinstance(image, InstanceImage) and image.width > 512 for image in subject.images)
