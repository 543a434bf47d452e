"""Class-prior generation: the same bytes whoever makes them, every set once, and no failure in silence."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from dreambooth.store import SubjectStore
from pipelines.planning.options import parse
from pipelines.planning.plan import make_plan
from pipelines.runtime.actor_pools import pool_size
from pipelines.runtime.console import Display
from pipelines.stages.priors import ClassPriorSampler, generate_priors
from tests.prior_sets import LANE, assert_whole, open_store, shards, small_sets, undisturbed
from tests.small_models import write_stable_diffusion

pytestmark = pytest.mark.usefixtures("local_ray")


def modified(store: SubjectStore) -> dict[Path, int]:
    assert store.root.local is not None
    return {path: path.stat().st_mtime_ns for path in store.root.local.glob("priors/*/*.parquet")}


def test_one_two_and_three_samplers_write_the_bytes_of_none(tmp_path: Path, small_sdxl: Path) -> None:
    sets = small_sets(small_sdxl)
    expected = undisturbed(open_store(tmp_path / "0", small_sdxl), sets, 18)
    assert len(expected[sets[0].key]) == 5  # the last batch is padded
    for samplers in (1, 2, 3):
        store = open_store(tmp_path / str(samplers), small_sdxl)
        assert generate_priors(store, [(prior, 18) for prior in sets], LANE, Display(), samplers) == {}
        assert_whole(store, sets, 18, expected)
        for prior in sets:
            assert Image.open((prior.location(store.root) / "preview.png").path).size[0] > 1000


def test_eight_subjects_of_three_classes_take_three_sets_which_grow_and_are_shared(
    tmp_path: Path, photos: Path, small_sdxl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nouns = ["dog", "mug", "dog", "stuffed animal", "mug", "dog", "dog", "mug"]
    subjects = [
        f"  - {{name: s{number}, images: ['{photos}'], class_noun: {noun}}}\n" for number, noun in enumerate(nouns)
    ]
    manifest = tmp_path / "subjects.yaml"
    manifest.write_text("subjects:\n" + "".join(subjects))
    arguments = ["--manifest", str(manifest), "--backbone", str(small_sdxl), "--store", str(tmp_path / "store")]
    arguments += ["--prior-images", "10", "--prior-batch", "4", "--prior-steps", "2", "--workers", "1"]
    plan = make_plan(parse(arguments, ""))
    plan.store.add_backbone(plan.backbone)
    priors = [planned.run.prior for planned in plan.subjects if planned.run.prior is not None]
    assert len(priors) == 8

    assert generate_priors(plan.store, [(prior, 10) for prior in priors], LANE, Display()) == {}
    made = modified(plan.store)
    assert len(made) == 3 * 3
    shown = capsys.readouterr().out
    assert "0/36 images" in shown
    for noun in set(nouns):
        assert f"'a {noun}' 12/12, preview in" in shown

    # One subject asks for more, the others for less: one set grows, and what is there stays as it is.
    wanted = [(prior, 17 if number == 1 else 3) for number, prior in enumerate(priors)]
    assert generate_priors(plan.store, wanted, LANE, Display()) == {}
    assert made.items() < modified(plan.store).items()
    assert sorted(len(shards(plan.store.root, prior)) for prior in set(priors)) == [3, 3, 5]

    before = modified(plan.store)
    preview = priors[0].location(plan.store.root) / "preview.png"
    Path(preview.path).unlink()  # as when a run is killed just before it is drawn
    assert generate_priors(plan.store, wanted, LANE, Display()) == {}
    assert modified(plan.store) == before
    assert preview.exists()


def test_a_shard_that_another_job_has_made_is_passed_over(tmp_path: Path, small_sdxl: Path) -> None:
    [prior] = small_sets(small_sdxl, ["a dog"])
    store = open_store(tmp_path, small_sdxl)
    sampler = ClassPriorSampler(store.root.uri, {prior.key: prior})
    row = {"set": prior.key, "shard": 3}
    assert sampler(row) == {**row, "failure": ""}
    before = modified(store)
    assert sampler(row) == {**row, "failure": ""}
    assert modified(store) == before


def spoil(store: SubjectStore, backbone: str) -> Path:
    """Let a weight of the stored backbone's decoder be infinite; returns the file as it was."""
    path = Path((store.root / "backbones" / backbone / "vae" / "diffusion_pytorch_model.safetensors").path)
    good = Path(shutil.copy(path, path.with_suffix(".good")))
    weights = load_file(path)
    weights["decoder.conv_in.weight"][0, 0] = float("inf")
    save_file(weights, path)
    return good


@pytest.mark.slow
def test_poisoned_shards_are_named_retried_alone_and_reported(
    tmp_path: Path, small_sdxl: Path, small_stable_diffusion: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_stable_diffusion(tmp_path / "other")
    store = open_store(tmp_path / "store", small_sdxl, small_stable_diffusion, other)
    [healthy], [broken], [repaired] = (
        small_sets(path, ["a dog"]) for path in (small_sdxl, small_stable_diffusion, other)
    )
    repaired = replace(repaired, prompt="a mug")
    spoil(store, broken.backbone)
    good = spoil(store, repaired.backbone)

    class Repairs(Display):
        """Puts the good weights back when it is told that a shard failed."""

        def say(self, text: str = "") -> None:
            super().say(text)
            if "'a mug'" in text and "will be retried alone" in text and good.exists():
                good.rename(good.with_suffix(".safetensors"))

    reasons = generate_priors(store, [(prior, 6) for prior in (healthy, broken, repaired)], LANE, Repairs())

    assert list(reasons) == [broken.key]
    assert "'a dog' images" in reasons[broken.key]
    assert "not finite" in reasons[broken.key]
    assert f"with seed {broken.seeds(0)[0]}" in capsys.readouterr().out
    assert shards(store.root, broken) == {}
    for prior, source in ((healthy, small_sdxl), (repaired, other)):
        clean = open_store(tmp_path / f"clean-{prior.key}", source)
        assert shards(store.root, prior) == undisturbed(clean, [prior], 6)[prior.key]


def test_the_pool_takes_what_the_cluster_has() -> None:  # three cores
    assert pool_size(LANE, 10) == 3
    assert pool_size(LANE, 2) == 2
    assert [pool_size(LANE, 10, 7), pool_size(LANE, 2, 7)] == [7, 2]
    assert pool_size(replace(LANE, cpus_per_worker=2), 10) == 1
    assert pool_size(replace(LANE, workers=5), 10) == 5  # more nodes may come
