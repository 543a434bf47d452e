"""A class noun that nobody gave: found from the photos, printed, and overridden by the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from dreambooth.metrics.clip import ClipJudge
from dreambooth.subjects.class_noun import find_class_noun
from dreambooth.subjects.photos import load_subject
from pipelines.personalize import main
from pipelines.planning.options import parse
from pipelines.planning.plan import make_plan


@pytest.fixture
def arguments(photos: Path, small_sdxl: Path, small_clip: Path, tmp_path: Path) -> list[str]:
    common = ["--backbone", str(small_sdxl), "--store", str(tmp_path / "store"), "--class-noun-judge", str(small_clip)]
    return ["--images", str(photos), "--dry-run", *common]


def test_it_is_found_printed_with_its_score_and_overridden(
    arguments: list[str], photos: Path, small_clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = [image.pixels() for image in load_subject("mug", str(photos), "any").images]
    found = find_class_noun(ClipJudge(small_clip), pictures)
    assert main(arguments) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"class noun {found}; --class-noun overrides it" in text
    assert f"class 'a {found.noun}'" in text
    assert all(f"'{noun}' {score:.2f}" in text for noun, score in found.runners_up)

    assert main([*arguments, "--class-noun", "teapot"]) == 0
    text = capsys.readouterr().out
    assert "class 'a teapot'" in text
    assert "runners-up" not in text


def test_in_a_manifest_it_is_found_for_the_subjects_without_one(
    arguments: list[str], photos: Path, tmp_path: Path
) -> None:
    manifest = tmp_path / "subjects.yaml"
    manifest.write_text(
        f"subjects:\n  - {{name: one, images: ['{photos}']}}\n"
        f"  - {{name: two, images: ['{photos}'], class_noun: teapot}}\n"
    )
    one, two = make_plan(parse(["--manifest", str(manifest), *arguments[2:]], "")).subjects
    assert one.found_noun is not None
    assert one.run.class_noun == one.subject.class_noun == one.found_noun.noun
    assert (two.run.class_noun, two.found_noun) == ("teapot", None)


def test_without_a_judge_the_way_out_is_told(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments[:-2]) == 2
    error = capsys.readouterr().err
    assert "--class-noun is missing" in error
    assert "--class-noun-judge" in error
