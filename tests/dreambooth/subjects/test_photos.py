import contextlib
import os
import re
import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from dreambooth.common.images import read_image
from dreambooth.common.location import Location
from dreambooth.subjects.manifest import SubjectSpec, load_manifest, parse_classes
from dreambooth.subjects.photos import InstanceImage, check_name, load_subject, normalize_class_noun

DREAMBENCH = Path(os.environ.get("DREAMBENCH_DIR", Path(__file__).parents[3] / "../shared/dreambench"))
needs_dreambench = pytest.mark.skipif(
    not DREAMBENCH.exists(), reason=f"needs DreamBench's photos, and there is no {DREAMBENCH}; set DREAMBENCH_DIR"
)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width: int = 96, height: int = 80, shift: int = 0) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, shift % 256)], -1).astype(np.uint8))


def photo(shift: int = 0) -> bytes:
    return encoded(gradient(shift=shift), "JPEG")


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def fill_folder(folder: Path, **files: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for stem, data in files.items():
        (folder / stem.replace("__", ".")).write_bytes(data)
    return folder


BAD = {
    "empty": (b"", "the file is empty"),
    "text": (b"these are my notes", "not an image"),
    "truncated jpeg": (photo()[:-300], "truncated or corrupt"),
    "truncated png": (encoded(gradient())[:150], "truncated or corrupt"),
    "header alone": (photo()[:24], "not an image|truncated or corrupt"),
    "bomb": (png_header(60_000, 60_000), "decompression bomb"),
    "small bomb": (png_header(10_000, 10_000), "decompression bomb"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64), "HEIC images .* convert it to JPEG"),
    "float": (encoded(Image.new("F", (64, 64), 0.5), "TIFF"), "floating-point"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("data", "reason"), BAD.values(), ids=BAD)
def test_a_bad_file_is_an_error_that_names_it(data, reason):
    with pytest.raises(ValueError, match=reason) as error:
        read_image(data, "holiday/dog.jpg")
    assert str(error.value).startswith("holiday/dog.jpg: ")


def test_a_bomb_warning_that_is_raised_is_the_same_error():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="decompression bomb"):
            read_image(png_header(10_000, 10_000), "dog.png")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = np.zeros((64, 96, 3), np.uint8)
    upright[:32, :48], upright[:32, 48:], upright[32:, :48] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = Image.fromarray(upright)
    if orientation in undo:
        stored = stored.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen = read_image(encoded(stored, exif=exif), "dog.png")
    np.testing.assert_array_equal(np.asarray(seen), upright)


def transparent_palette() -> bytes:
    image = Image.new("P", (64, 64), 1)
    image.putpalette([0, 0, 0, 200, 10, 20])
    image.paste(0, (0, 0, 64, 32))
    return encoded(image, transparency=0)


def grey_16_bit(kind: str) -> bytes:
    values = np.full((64, 64), 128 * 257, np.uint16)
    values[:32] = 65535
    return encoded(Image.fromarray(values), kind)


READS = {  # bytes, colour of the upper half, colour of the lower half
    "rgb": (encoded(Image.new("RGB", (64, 64), (9, 8, 7))), (9, 8, 7), (9, 8, 7)),
    "rgba": (encoded(Image.new("RGBA", (64, 64), (255, 0, 0, 0))), (255, 255, 255), (255, 255, 255)),
    "half transparent": (encoded(Image.new("RGBA", (64, 64), (0, 0, 0, 51))), (204,) * 3, (204,) * 3),
    "grey and alpha": (encoded(Image.new("LA", (64, 64), (0, 51))), (204,) * 3, (204,) * 3),
    "palette": (transparent_palette(), (255, 255, 255), (200, 10, 20)),
    "transparent colour": (
        encoded(Image.new("RGB", (64, 64), (1, 2, 3)), transparency=(1, 2, 3)),
        (255,) * 3,
        (255,) * 3,
    ),
    "grey": (encoded(Image.new("L", (64, 64), 77)), (77,) * 3, (77,) * 3),
    "1 bit": (encoded(Image.new("1", (64, 64), 1)), (255,) * 3, (255,) * 3),
    "16-bit png": (grey_16_bit("PNG"), (255,) * 3, (128,) * 3),
    "16-bit tiff": (grey_16_bit("TIFF"), (255,) * 3, (128,) * 3),
    "32-bit tiff": (encoded(Image.new("I", (64, 64), 100 * 257), "TIFF"), (100,) * 3, (100,) * 3),
    "cmyk jpeg": (encoded(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "JPEG"), (255, 0, 0), (255, 0, 0)),
    "cmyk tiff": (encoded(Image.new("CMYK", (64, 64), (0, 0, 0, 255)), "TIFF"), (0, 0, 0), (0, 0, 0)),
    "frames": (
        encoded(Image.new("RGB", (64, 64), "red"), "GIF", save_all=True, append_images=[Image.new("RGB", (64, 64))]),
        (255, 0, 0),
        (255, 0, 0),
    ),
    "broken profile": (encoded(Image.new("RGB", (64, 64), (9, 8, 7)), icc_profile=b"junk"), (9, 8, 7), (9, 8, 7)),
}


@pytest.mark.parametrize(("data", "upper", "lower"), READS.values(), ids=READS)
def test_every_kind_of_pixel_is_read_as_it_is_seen(data, upper, lower):
    image = read_image(data, "dog.png")
    assert image.mode == "RGB"
    np.testing.assert_allclose(np.asarray(image)[0, 0], upper, atol=2)
    np.testing.assert_allclose(np.asarray(image)[-1, -1], lower, atol=2)


def test_embedded_profiles_become_srgb():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    red_is_blue = srgb.replace(b"rXYZ", b"tmp ").replace(b"bXYZ", b"rXYZ").replace(b"tmp ", b"bXYZ")
    for profile, seen in ((srgb, (40, 90, 160)), (red_is_blue, (160, 90, 40))):
        data = encoded(Image.new("RGB", (64, 64), (40, 90, 160)), icc_profile=profile)
        np.testing.assert_allclose(np.asarray(read_image(data, "dog.png"))[0, 0], seen, atol=1)


@given(st.binary(max_size=400), st.integers(0, 2000))
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_give_an_image_or_a_value_error(noise, position):
    good = photo()
    with contextlib.suppress(ValueError):
        assert read_image(good[:position] + noise + good[position + len(noise) :], "dog.jpg").mode == "RGB"


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


def write_manifest(folder: Path, text: str) -> Path:
    (folder / "subjects.yaml").write_text(text)
    return folder / "subjects.yaml"


def test_a_yaml_manifest(tmp_path):
    manifest = write_manifest(
        tmp_path,
        """
subjects:
  - name: rex
    images: photos/rex
    class_noun: Dog
    identifier: sks
    prompts: ["a {subject} on the beach"]
  - name: bag
    images: [bag/*.jpg, /data/bag.png, "s3://bucket/bag?region=eu-west-1"]
""",
    )
    rex = SubjectSpec("rex", (f"{tmp_path}/photos/rex",), "dog", "sks", ("a {subject} on the beach",))
    images = (f"{tmp_path}/bag/*.jpg", "/data/bag.png", "s3://bucket/bag?region=eu-west-1")
    assert load_manifest(manifest) == [rex, SubjectSpec("bag", images)]
    with_uri = load_manifest(f"file://{manifest}")
    assert with_uri[0].images == (f"file://{tmp_path}/photos/rex",)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "must be a mapping with the key 'subjects'"),
        ("- rex", "must be a mapping with the key 'subjects'"),
        ("subjects: [", "not valid YAML"),
        ("subjects: []", "holds no subjects"),
        ("subjects: rex", "'subjects' must be a list"),
        ("subject: []", "unknown key 'subject'; did you mean 'subjects'"),
        ("subjects: [rex]", "subject 1: it must be a mapping"),
        ("subjects: [{name: rex, images: a}, {name: max, image: b}]", "subject 2: unknown key 'image'.*'images'"),
        ("subjects: [{name: rex, images: a, noun: dog}]", "unknown key 'noun'; did you mean 'class_noun'"),
        ("subjects: [{name: rex}]", "the key 'images' is missing or empty"),
        ("subjects: [{images: a}]", "the key 'name' is missing or empty"),
        ("subjects: [{name: 7, images: a}]", "name must be text, not 7; put it in quotes"),
        ("subjects: [{name: rex, images: [1]}]", r"images must be text or a list of texts, not \[1\]"),
        ("subjects: [{name: rex, images: a, class_noun: ' '}]", "class noun is empty"),
        ("subjects: [{name: Rex, images: a}]", "use 'rex'"),
        ("subjects: [{name: rex, images: a}, {name: rex, images: b}]", "must differ, and these do not: rex"),
    ],
)
def test_a_bad_manifest_is_an_error_that_names_the_place(tmp_path, text, reason):
    manifest = write_manifest(tmp_path, text)
    with pytest.raises(ValueError, match=reason) as error:
        load_manifest(manifest)
    assert str(error.value).startswith(f"manifest {manifest}: ")


def test_a_missing_manifest_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        load_manifest(tmp_path / "subjects.yaml")
    with pytest.raises(ValueError, match="holds no subjects"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("where", [".", "subjects"])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_folder_of_subjects(tmp_path, where, scheme):
    folder = tmp_path / "subjects"
    for name in ("dog10", "dog2", "bag", ".git"):
        fill_folder(folder / name, a__jpg=photo())
    listing = "Classes\n\nsubject_name,class\ndog2,dog\ndog10, Stuffed  animal\n\nPrompts\n\nbag,not a class\n"
    (tmp_path / where / "prompts_and_classes.txt").write_text(listing)
    root = f"{scheme}{folder}"
    assert load_manifest(root) == [
        SubjectSpec("bag", (f"{root}/bag",), None),
        SubjectSpec("dog2", (f"{root}/dog2",), "dog"),
        SubjectSpec("dog10", (f"{root}/dog10",), "stuffed animal"),
    ]


def test_classes_end_where_the_prompts_begin():
    assert parse_classes("subject_name,class\r\ncat,cat\r\nPrompts\r\n'a, b'") == {"cat": "cat"}


@needs_dreambench
def test_dreambench_is_a_manifest_and_its_photos_are_subjects():
    specs = {spec.name: spec for spec in load_manifest(DREAMBENCH / "subjects")}
    assert specs["grey_sloth_plushie"].class_noun == "stuffed animal"
    assert all(spec.class_noun for spec in specs.values())
    for name in ("dog", "backpack"):
        spec = specs[name]
        subject = load_subject(name, spec.images, spec.class_noun)
        assert len(subject.images) == len(list((DREAMBENCH / "subjects" / name).glob("*.jpg")))
        assert {(image.width, image.height) for image in subject.images} == {(512, 512)}
        assert subject.skipped == subject.warnings == ()


@needs_dreambench
def test_photos_of_original_size_are_read():
    subject = load_subject("colorful_sneaker", DREAMBENCH / "originals/colorful_sneaker", "sneaker")
    assert all(isinstance(image, InstanceImage) and image.width > 512 for image in subject.images)
