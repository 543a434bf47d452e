"""The table of scores: rows, means of what was made alike, and its file."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from dreambooth.metrics.scores import SCORES
from pipelines.stages.score import Scored
from pipelines.stages.score_table import kind_of, score_table, write_csv

NAMES = {name: name for name in SCORES}
TRAINING = {"method": "dreambooth", "steps": 400, "prior_weight": 1.0, "prior_kind": "images", "trained": ["unet"]}


def scored(subject: str, version: str, dino: float, **training: Any) -> Scored:
    scores = {"DINO": dino, "CLIP-I": 0.8, "CLIP-T": 0.3, "PRES": 0.5}
    return Scored(
        subject,
        version,
        {
            "scores": scores,
            "photos_with_each_other": {"DINO": 0.9, "CLIP-I": 0.95},
            "run": {"training": TRAINING | training},
        },
    )


def test_versions_that_were_made_alike_have_their_mean(tmp_path: Path) -> None:
    found = [scored("rex", "a", 0.6), scored("rex", "b", 0.7, prior_weight=0), scored("mug", "c", 0.4)]
    write_csv(tmp_path / "scores.csv", found, NAMES)
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert [(row["of"], row["kind"]) for row in rows] == [
        ("rex", "real photos"),
        ("rex@a", "DreamBooth, 400 steps"),
        ("rex@b", "DreamBooth, 400 steps, no prior term"),
        ("mug", "real photos"),
        ("mug@c", "DreamBooth, 400 steps"),
        ("mean of 2", "real photos"),
        ("mean of 2", "DreamBooth, 400 steps"),
        ("mean of 1", "DreamBooth, 400 steps, no prior term"),
    ]
    assert [float(row["DINO"]) for row in rows] == [0.9, 0.6, 0.7, 0.9, 0.4, 0.9, 0.5, 0.7]
    assert [row["DIV"] for row in rows] == [""] * 8
    heading, *lines = score_table(found, NAMES)
    assert "PRES (lower is better)" in heading
    assert len(lines) == 8
    assert lines[1].split() == ["rex@a", "DreamBooth,", "400", "steps", "0.600", "0.800", "0.300", "0.500", "-"]
    assert score_table([], NAMES) == []


def test_what_the_papers_tables_tell_apart_is_told_apart() -> None:
    assert kind_of(TRAINING | {"method": "textual-inversion"}) == "Textual Inversion, 400 steps"
    assert kind_of(TRAINING | {"prior_kind": "teacher"}) == "DreamBooth, 400 steps, prior by teacher"
    assert kind_of(TRAINING | {"trained": ["unet", "text_encoder"]}) == "DreamBooth, 400 steps, text trained"
    assert kind_of(TRAINING | {"bare_identifier": True}) == "DreamBooth, 400 steps, no class noun"
