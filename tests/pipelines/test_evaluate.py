"""Scoring versions: real Ray Data, diffusers' pipelines and small judges of the real classes."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreambooth.metrics.scores import Judging
from dreambooth.store import SubjectStore, Version
from dreambooth.subjects.prompts import OBJECT_PROMPTS
from dreambooth.versions.pipeline import VersionPipeline
from pipelines import evaluate
from pipelines.evaluate import EvaluateOptions, plan
from pipelines.runtime.console import Display
from pipelines.stages.score import draw_pictures, score_versions
from tests.pipelines.untrained_versions import publish_untrained
from tests.prior_sets import LANE

PROMPTS = ("a {subject} in the snow", "a red {subject}")

Versions = tuple[SubjectStore, list[Version]]


@pytest.fixture(scope="module")
def versions(
    photos: Path, small_sdxl: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SubjectStore, list[Version]]:
    """Three versions of a mug: with the prior term, without it, and by Textual Inversion."""
    store = SubjectStore(tmp_path_factory.mktemp("evaluated"))
    made = (), ("--prior-weight", "0"), ("--method", "textual-inversion")
    return store, [publish_untrained(store, photos, small_sdxl, *arguments) for arguments in made]


@pytest.fixture
def options(versions: Versions, photos: Path, small_dino: Path, small_clip: Path) -> EvaluateOptions:
    return EvaluateOptions(
        store=versions[0].root.uri,
        subject="mug",
        images=(str(photos),),
        versions="all",
        prompts=PROMPTS,
        images_a_prompt=2,
        class_images=3,
        steps=2,
        dino=str(small_dino),
        clip=str(small_clip),
    )


def arguments_of(options: EvaluateOptions, *more: object) -> list[str]:
    given = ["--store", options.store, "--subject", "mug", "--images", *options.images, "--versions", "all"]
    given += ["--prompts", *options.prompts, "--images-a-prompt", 2, "--class-images", 3, "--steps", 2]
    return [str(argument) for argument in (*given, "--dino", options.dino, "--clip", options.clip, *more)]


def table(shown: str) -> list[str]:
    return [line for line in shown.splitlines() if line.startswith("mug")]


def test_versions_are_drawn_scored_and_shown_and_nothing_is_done_twice(
    no_ray: None, versions: Versions, options: EvaluateOptions, photos: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    store, made = versions
    assert evaluate.main(arguments_of(options, "--csv", tmp_path / "scores.csv")) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in table(shown)] == ["mug", *(f"mug@{version.id}" for version in made)]
    for kind in ("real photos", "no prior term", "Textual Inversion"):
        assert kind in shown
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert [row["of"] for row in rows] == ["mug", *(f"mug@{version.id}" for version in made)]
    assert all(0 < float(row["DINO"]) <= 1 for row in rows)

    planned = plan(options)
    judging = planned.judging
    for one, row in zip(planned.versions, rows[1:], strict=True):
        # Drawn again by hand, and judged by the definitions.
        model = VersionPipeline.of_version(store, one.version, one.pictures.samplers)
        pictures = one.pictures.pictures(store.root)
        for shard, (template, indices) in enumerate(one.pictures.shards):
            again = model.draw([one.pictures.prompt(template)] * len(indices), one.pictures.seeds(shard))
            for image, index in zip(again, indices, strict=True):
                assert np.array_equal(np.asarray(image), np.asarray(pictures[template][index]))
        judges = judging.load()
        drawn = [image for template in PROMPTS for image in pictures[template]]
        real = judges.dino.embed_images([Image.open(path) for path in sorted(photos.iterdir())])
        assert float(row["DINO"]) == pytest.approx(float((judges.dino.embed_images(drawn) @ real.T).mean()), abs=1e-4)
        assert float(row["PRES"]) == pytest.approx(
            float((judges.dino.embed_images(pictures[None]) @ real.T).mean()), abs=1e-4
        )
        texts = judges.clip.embed_texts(["a mug in the snow", "a red mug"]).repeat_interleave(2, 0)
        assert float(row[judging.names()["CLIP-T"]]) == pytest.approx(
            float((judges.clip.embed_images(drawn) * texts).sum(1).mean()), abs=1e-4
        )
        sheet = Image.open(str(one.pictures.location(store.root) / "contact_sheet.png"))
        assert sheet.width > 600
        assert len(list((Path(store.root.uri) / "subjects" / "mug" / "scores" / one.version.id).iterdir())) == 1

    before = {path: path.stat().st_mtime_ns for path in Path(store.root.uri).rglob("*") if path.is_file()}
    assert evaluate.main(arguments_of(options)) == 0
    assert table(capsys.readouterr().out) == table(shown)
    after = {path: path.stat().st_mtime_ns for path in Path(store.root.uri).rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_shard_that_is_missing_is_drawn_alone_and_a_version_that_is_broken_leaves_the_others(
    versions: Versions, options: EvaluateOptions
) -> None:
    store, made = versions
    found_plan = plan(replace(options, seed=5))
    planned, judging = found_plan.versions, found_plan.judging
    assert draw_pictures(store, planned, LANE, Display()) == {}
    folder = Path(str(planned[0].pictures.location(store.root)))
    kept, lost = folder / "000000.parquet", folder / "000001.parquet"
    before, drawn = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    assert draw_pictures(store, planned, LANE, Display()) == {}
    assert lost.read_bytes() == drawn
    assert kept.stat().st_mtime_ns == before

    lost.write_bytes(b"no parquet")
    found = score_versions(store, planned, judging, LANE, Display(), {})
    assert [bool(one.failure) for one in found] == [True, False, False]
    assert [one.version for one in found] == [version.id for version in made]
    assert found[1].record["photos_were_trained_on"]


def test_by_default_all_of_dreambench_is_drawn_and_the_newest_version(
    versions: Versions, options: EvaluateOptions
) -> None:
    found = plan(replace(options, versions="newest", prompts=(), images_a_prompt=4, class_images=100))
    [one], judging = found.versions, found.judging
    assert one.version.id == versions[1][-1].id
    assert one.pictures.templates == OBJECT_PROMPTS
    assert one.pictures.count == 25 * 4 + 100
    assert judging == Judging(options.dino, options.clip)


def test_in_a_manifest_a_subject_that_cannot_be_scored_leaves_the_others_alone(
    versions: Versions, options: EvaluateOptions, photos: Path, tmp_path: Path
) -> None:
    manifest = tmp_path / "subjects.yaml"
    manifest.write_text(
        f"subjects:\n  - {{name: cup, images: ['{photos}'], class_noun: cup}}\n"
        f"  - {{name: mug, images: ['{photos}'], class_noun: mug}}\n"
    )
    found = plan(replace(options, subject=None, images=(), manifest=str(manifest)))
    assert [one.version.id for one in found.versions] == [version.id for version in versions[1]]
    assert list(found.failures) == ["cup"]
    assert "no version of 'cup'" in found.failures["cup"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subject": "cup"}, "no version of 'cup'"),
        ({"subject": None}, "--subject is missing"),
        ({"images": ()}, "came without --images"),
        ({"images": ("/nowhere",)}, "nowhere"),
        ({"manifest": "subjects.yaml"}, "leave out --images"),
        ({"prompts": ("a dog in the snow",)}, "does not name the subject"),
        ({"prompts": ("a {subject} in the {place}",)}, "{place}"),
        ({"images_a_prompt": 0}, "--images-a-prompt must be above 0"),
        ({"class_images": -1}, "--class-images"),
        ({"csv": "/nowhere/scores.csv"}, "--csv"),
        ({"dino": "/nowhere"}, "nowhere"),
        ({"lpips": "/nowhere.safetensors"}, "nowhere"),
    ],
)
def test_bad_input_is_told_before_anything_is_drawn(
    options: EvaluateOptions, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message.replace("{", r"\{")):
        plan(replace(options, **change))  # type: ignore[arg-type]
