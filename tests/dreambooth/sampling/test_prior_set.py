from __future__ import annotations

import io
import json
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dreambooth.common.location import Location
from dreambooth.sampling.prior_set import SCHEMA, PriorSet, latent
from dreambooth.sampling.sampler import SamplerSettings

SAMPLER = SamplerSettings(
    resolution=32, steps=20, guidance=5.0, batch=4, threads=1, precision="fp32", scheduler="DDPMScheduler"
)
PRIOR = PriorSet("a backbone's hash", "a dog", SAMPLER, 0)
COLUMNS = ["id", "index", "prompt", "seed", "png", "latent_shape", "latent_mean", "latent_log_variance"]


def of_batch(batch: int) -> PriorSet:
    return replace(PRIOR, sampler=replace(SAMPLER, batch=batch))


def drawn(shard: int, batch: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, and latents with the values that a lossy form would change."""
    generator = np.random.default_rng(shard)
    images = generator.integers(0, 256, (batch, 16, 24, 3), np.uint8)
    mean, log_variance = (generator.standard_normal((batch, 4, 4, 6), np.float32) for _ in range(2))
    mean[0, 0, 0, :4] = [1e-42, -0.0, 3e38, 1 / 3]
    return images, mean, log_variance


OTHER_SETTINGS: dict[str, Any] = {
    "resolution": 64,
    "steps": 21,
    "guidance": 5.5,
    "batch": 8,
    "threads": 2,
    "precision": "bf16",
    "scheduler": None,
    "compile": True,
}
OTHERS = [
    replace(PRIOR, backbone="another's"),
    replace(PRIOR, prompt="a cat"),
    replace(PRIOR, seed=1),
    *(replace(PRIOR, sampler=replace(SAMPLER, **{name: value})) for name, value in OTHER_SETTINGS.items()),
]


def test_the_key_depends_on_every_field() -> None:
    assert len(OTHERS) == len(fields(PriorSet)) - 1 + len(fields(SamplerSettings)), "a new field needs its line above"
    keys = {other.key for other in (PRIOR, *OTHERS)}
    assert len(keys) == len(OTHERS) + 1


def test_the_key_keeps_its_value() -> None:
    assert PRIOR.key == "347e9ed9889f1c3d0e0146fb6a536ced"


@pytest.mark.parametrize("prior", [PRIOR, *OTHERS])
def test_a_set_comes_back_from_json(prior: PriorSet) -> None:
    assert PriorSet.from_dict(json.loads(json.dumps(prior.as_dict()))) == prior


@given(st.integers(0, 500), st.integers(1, 40))
def test_shards_hold_the_images_and_no_shard_is_without(count: int, batch: int) -> None:
    prior = of_batch(batch)
    indices = [index for shard in prior.shards(count) for index in prior.indices(shard)]
    assert indices == list(range(len(indices)))
    assert count <= len(indices) < count + batch


@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 40))
def test_a_larger_request_extends_what_a_smaller_one_made(count: int, more: int, batch: int) -> None:
    prior = of_batch(batch)
    shards, larger = list(prior.shards(count)), list(prior.shards(count + more))
    assert larger[: len(shards)] == shards


@given(st.integers(0, 1000), st.integers(1, 40))
def test_seeds_belong_to_the_image(shard: int, batch: int) -> None:
    prior = of_batch(batch)
    seeds = prior.seeds(shard) + prior.seeds(shard + 1)
    assert len(set(seeds)) == 2 * batch


def test_a_sets_first_seeds_keep_their_values() -> None:
    assert PRIOR.seeds(0) == [4049318497, 4049318498, 4049318499, 4049318500]


def test_what_is_written_is_read_back_exactly(place: Location) -> None:
    for shard in (1, 0):
        PRIOR.write_shard(place, shard, *drawn(shard))
    rows = list(PRIOR.rows(place, 8, COLUMNS))
    images, means, log_variances = (np.concatenate(arrays) for arrays in zip(drawn(0), drawn(1), strict=True))
    assert [row["index"] for row in rows] == list(range(8))
    assert [row["seed"] for row in rows] == PRIOR.seeds(0) + PRIOR.seeds(1)
    assert {row["prompt"] for row in rows} == {"a dog"}
    assert len({row["id"] for row in rows}) == 8
    for row, image, mean, log_variance in zip(rows, images, means, log_variances, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(row["png"]))), image)
        assert latent(row, "latent_mean").tobytes() == mean.tobytes()
        assert latent(row, "latent_log_variance").tobytes() == log_variance.tobytes()
        assert latent(row, "latent_mean").shape == (4, 4, 6)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8])
def test_the_first_images_are_read_in_order(place: Location, count: int) -> None:
    for shard in (0, 1):
        PRIOR.write_shard(place, shard, *drawn(shard))
    assert [row["index"] for row in PRIOR.rows(place, count, ["index"])] == list(range(count))


def test_only_the_columns_asked_for_are_read(place: Location) -> None:
    PRIOR.write_shard(place, 0, *drawn(0))
    assert [row.keys() for row in PRIOR.rows(place, 2, ["id"])] == [{"id"}] * 2


def test_a_missing_shard_is_an_error(place: Location) -> None:
    PRIOR.write_shard(place, 0, *drawn(0))
    PRIOR.write_shard(place, 2, *drawn(2))
    rows = PRIOR.rows(place, 12, ["index"])
    assert [next(rows)["index"] for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(FileNotFoundError, match="000001"):
        next(rows)


def test_what_is_present_is_known_by_shard(place: Location) -> None:
    assert PRIOR.present(place) == set()
    for shard in (3, 0):
        PRIOR.write_shard(place, shard, *drawn(shard))
    (PRIOR.location(place) / ".000001.parquet.0123").write_bytes(b"the remains of a write that was killed")
    assert PRIOR.present(place) == {0, 3}
    assert OTHERS[0].present(place) == set()


def test_writing_a_shard_twice_changes_nothing(place: Location) -> None:
    contents: list[Any] = []
    for _ in range(2):
        PRIOR.write_shard(place, 0, *drawn(0))
        folder = PRIOR.location(place)
        contents.append({name: (folder / name).read_bytes() for name in folder.files()})
    assert contents[0] == contents[1]
    assert contents[0].keys() == {"000000.parquet", "set.json"}
    assert PriorSet.from_dict(json.loads(contents[0]["set.json"])) == PRIOR


def test_a_shard_of_another_size_is_refused(place: Location) -> None:
    with pytest.raises(IndexError):
        PRIOR.write_shard(place, 0, *drawn(0, batch=3))
    assert PRIOR.present(place) == set()


def test_shards_are_plain_parquet_with_the_schema(place: Location) -> None:
    PRIOR.write_shard(place, 0, *drawn(0))
    data = (PRIOR.location(place) / "000000.parquet").read_bytes()
    assert pq.read_table(io.BytesIO(data)).schema.equals(SCHEMA)


def test_noise_belongs_to_the_image_and_not_to_the_batch() -> None:
    def seeds(prior: PriorSet, count: int) -> list[int]:
        return [seed for shard in prior.shards(count) for seed in prior.seeds(shard)][:count]

    expected = seeds(PRIOR, 24)
    for batch in (1, 3, 8):
        assert seeds(of_batch(batch), 24) == expected
    assert not set(expected) & set(seeds(replace(PRIOR, prompt="a cat"), 24))
    assert not set(expected) & set(seeds(replace(PRIOR, seed=1), 24))


def test_a_preview_shows_the_first_images(place: Location) -> None:
    def size(preview: Location) -> tuple[int, int]:
        return Image.open(io.BytesIO(preview.read_bytes())).size

    PRIOR.write_shard(place, 0, *drawn(0))
    few = size(PRIOR.write_preview(place, 4))
    for shard in range(1, 8):
        PRIOR.write_shard(place, shard, *drawn(shard))
    many = size(PRIOR.write_preview(place, 32))
    assert many[0] == few[0]
    assert many[1] > 3 * (few[1] - 100)
    assert PRIOR.present(place) == set(range(8))
