"""Preflight: the cheapest way to train that fits a device is proposed, and taken at its word it is one."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from dreambooth.backbones import open_backbone
from dreambooth.memory import GPU_RESERVE, footprint
from pipelines.personalize import main
from pipelines.planning.options import parse
from pipelines.planning.plan import make_plan
from pipelines.planning.preflight import Preflight
from tests.full_size import write_full_size
from tests.pipelines.engines import lane, training

WAYS = [way for way in product(("none", "cpu"), (False, True), (0, 1, 2, 3)) if way[::2] != ("cpu", 0)]
"""Offloading, checkpointing and ZeRO stage, the cheapest first; beyond them lies a disk."""


def arguments(photos: Path, backbone: Path, store: Path, *more: str) -> list[str]:
    """Fine-tuning of a small backbone in float32 by two workers."""
    given = ["--images", str(photos), "--class-noun", "mug", "--backbone", str(backbone), "--store", str(store)]
    return [*given, "--workers", "2", "--batch", "4", *more]


def test_the_proposal_is_the_first_way_that_fits(photos: Path, small_sdxl: Path, tmp_path: Path) -> None:
    settings = {"rows": 4, "resolution": 32, "precision": "fp32", "trained": ("unet",)}
    measured = {kept: footprint(open_backbone(small_sdxl), **settings, gradient_checkpointing=kept) for kept in (0, 1)}
    totals = {way: measured[way[1]].shared(way[2], 2, way[0]).total for way in WAYS}
    proposed = set()
    for room in totals.values():
        plan = make_plan(parse(arguments(photos, small_sdxl, tmp_path, "--device-memory", str(room / 2**30)), ""))
        found = plan.preflight.propose()
        assert found is not None
        way = found.offload, found.gradient_checkpointing, found.zero_stage
        assert way == next(way for way in WAYS if totals[way] <= room)
        assert [memory.total for memory in found.memory] == [totals[way]]
        proposed.add(way)
    assert len(proposed) > 6


def test_what_is_proposed_is_printed_as_options_and_fits_when_given(
    photos: Path, small_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = arguments(photos, small_sdxl, tmp_path, "--dry-run", "--device-memory")

    def printed(gib: float, *more: str) -> str:
        assert main([*asked, str(gib), *more]) == 0
        return capsys.readouterr().out

    whole = make_plan(parse(asked[:-2], "")).memory[0].total / 2**30
    text = printed(0.9 * whole)
    assert "DOES NOT FIT in" in text
    [proposal] = [line for line in text.splitlines() if "The least that fits: " in line]
    options = proposal.partition("The least that fits: ")[2].partition(",")[0].split()
    text = printed(0.9 * whole, *options)
    assert "Fits in" in text
    assert "It is the lowest ZeRO stage" in text
    assert "The least that fits: --zero-stage 0 --offload none," in printed(9)
    assert "Nothing fits" in printed(1e-5)


def test_a_file_of_deepspeed_settings_that_names_a_stage_is_kept_to(
    photos: Path, small_sdxl: Path, tmp_path: Path
) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text('{"zero_optimization": {"stage": 2}}')
    asked = arguments(photos, small_sdxl, tmp_path, "--deepspeed", str(file), "--device-memory", "9")
    found = make_plan(parse(asked, "")).preflight.propose()
    assert found is not None
    assert found.zero_stage == 2


@pytest.mark.parametrize(
    ("workers", "gigabytes", "expected"),
    [(1, 24, (1, "cpu", True)), (1, 80, (1, "none", True)), (8, 24, (1, "none", True))],
)
def test_sdxl_at_full_size(tmp_path: Path, workers: int, gigabytes: int, expected: tuple[int, str, bool]) -> None:
    backbone = open_backbone(write_full_size(tmp_path, "sdxl"))
    chosen = training(resolution=1024, precision="bf16", batch=4 * workers, prior_weight=1.0)
    preflight = Preflight([(backbone, chosen)], lane(workers=workers, gpus_per_worker=1.0), gigabytes * 10**9)
    found = preflight.propose()
    assert found is not None
    assert found.memory[0].total + GPU_RESERVE <= gigabytes * 10**9
    assert (found.zero_stage, found.offload, found.gradient_checkpointing) == expected
