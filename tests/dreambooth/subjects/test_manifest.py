from pathlib import Path

import pytest

from dreambooth.subjects.manifest import SubjectSpec, load_manifest, parse_classes
from dreambooth.subjects.photos import load_subject
from tests.photo_files import DREAMBENCH, fill_folder, needs_dreambench, photo


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
