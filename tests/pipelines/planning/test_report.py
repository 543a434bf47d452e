"""What a dry run prints: what was chosen, then the plan."""

from __future__ import annotations

import shutil
from itertools import takewhile
from pathlib import Path

import pytest

from pipelines.planning.options import parse
from pipelines.planning.plan import Plan, make_plan
from pipelines.planning.report import describe


def plan_of(photos: Path, backbone: Path, store: Path, *more: str) -> Plan:
    arguments = ["--images", str(photos), "--class-noun", "mug", "--backbone", str(backbone), "--store", str(store)]
    return make_plan(parse([*arguments, *more, "--dry-run"], ""))


def choices(plan: Plan) -> dict[str, tuple[str, str]]:
    """Value and default of each option in the first block."""
    first = list(takewhile(bool, describe(plan, width=400)))
    assert first[0].split() == ["Your", "choices", "value", "default"]
    rows = (line.split(maxsplit=2) for line in first[2:])
    return {flag: (value, default) for flag, value, default in rows}


def words(plan: Plan, width: int = 110) -> str:
    return " ".join(" ".join(describe(plan, width)).split())


def test_what_was_chosen_stands_first_and_nothing_that_is_at_its_default(
    photos: Path, small_sdxl: Path, tmp_path: Path
) -> None:
    given = ("--steps", "40", "--batch", "4", "--flip", "--precision", "fp32", "--seed", "0", "--prior-weight", "0.5")
    plan = plan_of(photos, small_sdxl, tmp_path, *given, "--sample-steps", "40", "--no-captions")
    assert choices(plan) == {
        "--images": (str(photos), "the sample subject"),
        "--class-noun": ("mug", "what --class-noun-judge finds"),
        "--backbone": (str(small_sdxl), "embedded"),
        "--prior-weight": ("0.5", "1"),
        "--steps": ("40", "800"),
        "--flip": ("yes", "no"),
        "--precision": ("fp32", "bf16 on GPUs, fp32 on CPUs"),
        "--store": (str(tmp_path), "~/dreambooth-store"),
    }


def test_defaults_are_those_of_the_method_the_text_encoder_and_the_machine(
    photos: Path, small_sdxl: Path, small_stable_diffusion: Path, tmp_path: Path
) -> None:
    rate = ("--learning-rate", "0.5", "--steps", "7")
    plain = choices(plan_of(photos, small_stable_diffusion, tmp_path, *rate))
    with_text = choices(plan_of(photos, small_stable_diffusion, tmp_path, *rate, "--train-text-encoder"))
    inversion = choices(plan_of(photos, small_sdxl, tmp_path, *rate, "--method", "textual-inversion"))
    assert (plain["--learning-rate"], plain["--steps"]) == (("0.5", "5e-06"), ("7", "800"))
    assert with_text["--learning-rate"] == ("0.5", "2e-06")
    assert (inversion["--learning-rate"], inversion["--steps"]) == (("0.5", "0.002"), ("7", "3000"))
    machine = ("--preset", "8x80GB", "--steps", "7", "--batch", "16", "--offload", "cpu", "--zero-stage", "2")
    on_machine = choices(plan_of(photos, small_sdxl, tmp_path, *machine))
    assert (on_machine["--steps"], on_machine["--batch"]) == (("7", "400"), ("16", "8"))
    assert on_machine["--offload"] == ("cpu", "none")
    assert "--zero-stage" not in on_machine


def test_without_choices_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    plan = make_plan(parse(["--dry-run"], ""))
    assert next(iter(describe(plan))) == "Your choices: none, all options are at their defaults"


def test_many_images_are_counted(photos: Path, small_sdxl: Path, tmp_path: Path) -> None:
    images = sorted(map(str, photos.iterdir())) * 2
    plan = make_plan(
        parse(["--images", *images, "--subject", "x", "--class-noun", "mug", "--backbone", str(small_sdxl)], "")
    )
    assert choices_text(plan).count(".png") == 3
    assert "and 3 more" in choices_text(plan)


def choices_text(plan: Plan) -> str:
    return "\n".join(takewhile(bool, describe(plan, width=1000)))


@pytest.mark.parametrize("width", [80, 110])
def test_the_plan_is_told_whole_and_none_is_told_nowhere(
    photos: Path, small_sdxl: Path, tmp_path: Path, width: int
) -> None:
    folder = Path(shutil.copytree(photos, tmp_path / "mug"))
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"a {{subject}} on table {number}")
    (folder / "Thumbs.db").write_bytes(b"junk")
    shutil.copy(folder / "0.png", folder / "9.png")
    shutil.copy(folder / "0.txt", folder / "9.txt")
    plan = plan_of(folder, small_sdxl, tmp_path / "store", "--captions", "--buckets", "--prior-images", "10")
    [planned] = plan.subjects
    run, text = planned.run, words(plan, width)
    assert planned.subject.warnings
    for part in (
        f"mug 4 mug '{run.identifier}' {' '.join(map(str, run.token_ids))} {run.version}",
        "photos 4: 0.png, 1.png, 2.png, 9.png",
        f"prompts 'a {run.identifier} mug'; class 'a mug'",
        "passed over Thumbs.db",
        *(f"note {warning}" for warning in planned.subject.warnings),
        "view 1.png: 40 x 24 pixels of 40 x 25",
        f"caption 2.png: 'a {run.identifier} mug on table 2'",
        f"{small_sdxl.name} sdxl {plan.backbone.hash[:12]}" if width == 110 else plan.backbone.hash[:12],
        "frames 32 x 32, ",
        "learning rate 1e-06",
        "steps 800",
        "gradient checkpointing no",
        "zero stage 2",
        "'a mug' 10 0 10",
        "Memory per device, ZeRO stage 2",
        "parameters trained",
        "optimizer states",
        "Fits in",
        "Disk: at most about",
    ):
        assert part in text, part
    assert "None" not in text
    assert not [line for line in describe(plan, width) if len(line) > width and "least that fits" not in line]


def test_of_many_subjects_each_has_a_row_and_what_is_out_of_the_ordinary(
    photos: Path, small_sdxl: Path, tmp_path: Path
) -> None:
    junk = Path(shutil.copytree(photos, tmp_path / "junk"))
    (junk / "Thumbs.db").write_bytes(b"junk")
    manifest = tmp_path / "subjects.yaml"
    rows = [f"  - {{name: mug-{number}, images: ['{photos}'], class_noun: mug}}" for number in range(20)]
    rows += [f"  - {{name: {name}, images: ['{tmp_path / name}'], class_noun: mug}}" for name in ("junk", "absent")]
    manifest.write_text("\n".join(["subjects:", *rows]))
    arguments = ["--manifest", str(manifest), "--backbone", str(small_sdxl), "--store", str(tmp_path / "store")]
    plan = make_plan(parse([*arguments, "--dry-run"], ""))
    lines = list(describe(plan, 110))
    assert "Subjects (21)" in words(plan)
    for planned in plan.subjects:
        assert len([line for line in lines if line.startswith(f"{planned.subject.name} ")]) == 1
    assert "junk: passed over Thumbs.db" in lines
    assert not [line for line in lines if line.startswith("mug-3:")]
    assert "absent cannot be personalized: subject 'absent': these images cannot be used:" in words(plan)
    assert len(lines) < 90

    (junk / "0.txt").write_text("a {subject} on a table")
    captioned = make_plan(parse([*arguments, "--dry-run", "--captions", "--buckets"], ""))
    assert set(captioned.failures) == {"absent", "junk", *(f"mug-{number}" for number in range(20))}


def test_in_short_views_and_captions_are_counted(photos: Path, small_sdxl: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(photos, tmp_path / "mug"))
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"a {{subject}} on table {number}")
    manifest = tmp_path / "subjects.yaml"
    rows = [f"  - {{name: mug-{number}, images: ['{folder}'], class_noun: mug}}" for number in range(4)]
    manifest.write_text("\n".join(["subjects:", *rows]))
    arguments = ["--manifest", str(manifest), "--backbone", str(small_sdxl), "--store", str(tmp_path / "store")]
    plan = make_plan(parse([*arguments, "--captions", "--buckets"], ""))
    identifier = plan.subjects[0].run.identifier
    assert (
        "mug-0: views 1 of 32 x 32 pixels, 1 of 40 x 24 pixels, 1 of 24 x 40 pixels; "
        f"captions 3, the first 'a {identifier} mug on table 0'"
    ) in words(plan)


def test_a_cascade_has_a_column_for_each_stage(
    photos: Path, small_if: Path, small_if_super_resolution: Path, tmp_path: Path
) -> None:
    second = ("--super-resolution", str(small_if_super_resolution), "--offload", "cpu")
    text = words(plan_of(photos, small_if, tmp_path, *second))
    assert "Training (stage I / stage II)" in text
    assert "learning rate 1e-07 / 5e-06" in text
    assert "low resolution none / side 32, noise level 0" in text
    assert "ZeRO stage 2 stage I stage II" in text
    assert "offloaded to host" in text
    assert "None" not in text
