"""The plan: every default resolved, and what it says of a run before anything is done."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.personalize import main
from pipelines.planning.options import parse
from pipelines.planning.plan import Plan, make_plan


def plan_of(photos: Path, backbone: Path, store: Path, *more: str) -> Plan:
    arguments = ["--images", str(photos), "--class-noun", "mug", "--backbone", str(backbone), "--store", str(store)]
    return make_plan(parse([*arguments, *more], ""))


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    photos: Path, small_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    arguments = ["--images", str(photos), "--class-noun", "mug", "--backbone", str(small_sdxl), "--store", str(store)]
    assert main([*arguments, "--prior-images", "10", "--zero-stage", "2", "--dry-run"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("identifier", "token ids", "already there", "'a mug' 10 0 10", "ZeRO stage 2"):
        assert part in text
    for part in ("weights", "gradients", "optimizer states", "activations", "total", "Fits in"):
        assert part in text
    assert not store.exists()


def test_the_plan_tells_when_memory_does_not_suffice(
    photos: Path, small_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--images", str(photos), "--class-noun", "mug", "--backbone", str(small_sdxl)]
    assert main([*arguments, "--store", str(tmp_path), "--device-memory", "0.0001", "--dry-run"]) == 0
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_the_same_inputs_make_the_same_run_and_every_setting_another(
    photos: Path, small_sdxl: Path, tmp_path: Path
) -> None:
    def key(*more: str, store: str = "a") -> str:
        [planned] = plan_of(photos, small_sdxl, tmp_path / store, *more).subjects
        return planned.run.key

    same = {key(), key(), key(store="b"), key("--checkpoint-every", "7"), key("--verbose")}
    others = {
        key("--seed", "1"),
        key("--steps", "9"),
        key("--prior-weight", "0.5"),
        key("--train-text-encoder"),
        key("--workers", "1"),
        key("--subject", "cup"),
        key("--sample-prompts", "{subject} in the snow"),
    }
    assert len(same) == 1
    assert len(others | same) == 8


def test_a_subject_keeps_its_identifier_and_no_other_gets_it(photos: Path, small_sdxl: Path, tmp_path: Path) -> None:
    [first] = plan_of(photos, small_sdxl, tmp_path, "--subject", "one").subjects
    store = plan_of(photos, small_sdxl, tmp_path).store
    store.claim_identifier("one", first.run.identifier)
    [again] = plan_of(photos, small_sdxl, tmp_path, "--subject", "one", "--seed", "5").subjects
    assert again.run.identifier == first.run.identifier
    with pytest.raises(ValueError, match="belongs to another subject"):
        plan_of(photos, small_sdxl, tmp_path, "--subject", "two", "--identifier", first.run.identifier)
    for seed in range(5):
        [other] = plan_of(photos, small_sdxl, tmp_path, "--subject", "two", "--seed", str(seed)).subjects
        assert other.run.identifier != first.run.identifier


def test_without_a_prior_term_there_are_no_prior_images(photos: Path, small_sdxl: Path, tmp_path: Path) -> None:
    plan = plan_of(photos, small_sdxl, tmp_path, "--prior-weight", "0")
    [planned] = plan.subjects
    assert planned.run.prior is None
    assert plan.missing_priors() == {}


def test_a_bare_identifier_stands_for_the_subject_without_its_noun(
    photos: Path, small_sdxl: Path, tmp_path: Path
) -> None:
    [usual] = plan_of(photos, small_sdxl, tmp_path).subjects
    [bare] = plan_of(photos, small_sdxl, tmp_path, "--bare-identifier").subjects
    assert usual.run.instance_prompt == f"a {usual.run.identifier} mug"
    assert bare.run.instance_prompt == f"a {usual.run.identifier}"
    assert bare.run.sample_prompts[1] == f"a {usual.run.identifier} on the beach"
    assert (bare.run.class_prompt, bare.run.prior) == ("a mug", usual.run.prior)
    assert bare.run.version != usual.run.version


def test_a_backbone_without_a_batch_of_its_own_takes_its_familys_preset(
    photos: Path, small_sdxl: Path, small_stable_diffusion: Path, tmp_path: Path
) -> None:
    [sdxl] = plan_of(photos, small_sdxl, tmp_path).subjects
    [sd] = plan_of(photos, small_stable_diffusion, tmp_path, "--train-text-encoder").subjects
    assert (sdxl.run.training.learning_rate, sdxl.run.training.trained) == (1e-6, ("unet",))
    assert (sd.run.training.learning_rate, sd.run.training.trained) == (2e-6, ("unet", "text_encoder"))
    assert replace(sd.run, seed=1).key != sd.run.key


def test_a_machine_preset_gives_defaults_and_options_win(photos: Path, small_sdxl: Path, tmp_path: Path) -> None:
    plan = plan_of(photos, small_sdxl, tmp_path, "--preset", "1x24GB")
    [planned] = plan.subjects
    lane, training = planned.run.lane, planned.run.training
    assert (lane.workers, lane.gpus_per_worker, lane.zero_stage, lane.offload) == (1, 1.0, 2, "cpu")
    assert (training.precision, training.gradient_checkpointing, training.steps) == ("bf16", True, 800)
    assert training.resolution == 32  # the backbone's own
    assert plan.preflight.device_bytes == 24 * 10**9

    chosen = ("--zero-stage", "3", "--offload", "none", "--precision", "fp16", "--steps", "7", "--batch", "16")
    [other] = plan_of(photos, small_sdxl, tmp_path, "--preset", "8x80GB", *chosen, "--learning-rate", "1e-3").subjects
    lane, training = other.run.lane, other.run.training
    assert (lane.workers, lane.zero_stage, lane.offload) == (8, 3, "none")
    assert (training.precision, training.steps, training.batch, training.learning_rate) == ("fp16", 7, 16, 1e-3)
    assert not training.gradient_checkpointing


@pytest.mark.parametrize(
    ("options", "zero_stage"),
    [
        (("--workers", "1"), 0),
        (("--workers", "2"), 2),
        (("--workers", "1", "--precision", "bf16"), 2),
        (("--workers", "1", "--gpus-per-worker", "1"), 2),
        (("--workers", "1", "--offload", "cpu"), 2),
        (("--workers", "1", "--zero-stage", "3"), 3),
    ],
)
def test_zero_is_used_where_there_is_something_to_shard_to_round_or_to_offload(
    photos: Path, small_sdxl: Path, tmp_path: Path, options: tuple[str, ...], zero_stage: int
) -> None:
    [planned] = plan_of(photos, small_sdxl, tmp_path, *options).subjects
    assert planned.run.lane.zero_stage == zero_stage
