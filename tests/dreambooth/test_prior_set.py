"""Class-prior sets: their address, their seeds, and what is written is what is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreambooth.prior_set import PriorSet, latent
from dreambooth.sampling import SamplerSettings
from dreambooth.storage import Location
from dreambooth.subject import read_image

SAMPLER = SamplerSettings(32, 4, 5.0, 4, 1, "fp32", "EulerAncestralDiscreteScheduler")
PRIOR = PriorSet("f00d", "a dog", SAMPLER, 0)


def write(prior: PriorSet, store: Location, shard: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    noise = np.random.default_rng(shard)
    images = noise.integers(0, 256, (4, 32, 32, 3)).astype(np.uint8)
    mean, log_variance = noise.standard_normal((2, 4, 4, 8, 8)).astype(np.float32)
    prior.write_shard(store, shard, images, mean, log_variance)
    return images, mean, log_variance


def test_everything_that_determines_an_image_is_in_the_key() -> None:
    samplers = [
        replace(SAMPLER, resolution=64),
        replace(SAMPLER, steps=5),
        replace(SAMPLER, guidance=4.0),
        replace(SAMPLER, batch=8),
        replace(SAMPLER, threads=2),
        replace(SAMPLER, precision="bf16"),
        replace(SAMPLER, scheduler="DDIMScheduler"),
        replace(SAMPLER, compile=True),
    ]
    others = [replace(PRIOR, sampler=sampler) for sampler in samplers]
    others += [replace(PRIOR, backbone="beef"), replace(PRIOR, prompt="a cat"), replace(PRIOR, seed=1)]
    assert len({PRIOR.key, *(other.key for other in others)}) == 12
    assert PriorSet.from_dict(PRIOR.as_dict()) == PRIOR


def test_noise_belongs_to_the_image_and_not_to_the_batch() -> None:
    def seeds(prior: PriorSet, count: int) -> list[int]:
        return [seed for shard in prior.shards(count) for seed in prior.seeds(shard)][:count]

    expected = seeds(PRIOR, 24)
    assert len(set(expected)) == 24
    for batch in (1, 3, 8):
        assert seeds(replace(PRIOR, sampler=replace(SAMPLER, batch=batch)), 24) == expected
    assert not set(expected) & set(seeds(replace(PRIOR, prompt="a cat"), 24))
    assert not set(expected) & set(seeds(replace(PRIOR, seed=1), 24))


def test_what_is_read_is_what_was_written_and_a_request_takes_a_prefix(tmp_path: Path) -> None:
    store = Location.of(tmp_path)
    written = [write(PRIOR, store, shard) for shard in (0, 1)]
    images, means, log_variances = (np.concatenate(parts) for parts in zip(*written, strict=True))
    rows = list(PRIOR.rows(store, 7, ["id", "index", "prompt", "seed", "backbone", "png", *LATENTS]))
    assert [row["index"] for row in rows] == list(range(7))
    assert [row["seed"] for row in rows] == (PRIOR.seeds(0) + PRIOR.seeds(1))[:7]
    assert {(row["prompt"], row["backbone"]) for row in rows} == {("a dog", "f00d")}
    for index, row in enumerate(rows):
        assert np.array_equal(read_image(row["png"], row["id"]), images[index])
        assert np.array_equal(latent(row, "latent_mean"), means[index])
        assert np.array_equal(latent(row, "latent_log_variance"), log_variances[index])
    assert PRIOR.present(store) == {0, 1}
    assert PRIOR.has_shard(store, 1)
    assert not PRIOR.has_shard(store, 2)


LATENTS = ("latent_shape", "latent_mean", "latent_log_variance")


def test_a_missing_shard_is_an_error_and_never_a_shorter_set(tmp_path: Path) -> None:
    store = Location.of(tmp_path)
    for shard in (0, 2):
        write(PRIOR, store, shard)
    with pytest.raises(FileNotFoundError):
        list(PRIOR.rows(store, 12, ["id"]))


def test_a_preview_shows_the_first_images(tmp_path: Path) -> None:
    store = Location.of(tmp_path)
    write(PRIOR, store, 0)
    preview = PRIOR.write_preview(store, 4)
    few = Image.open(preview.path).size
    for shard in range(1, 8):
        write(PRIOR, store, shard)
    assert PRIOR.write_preview(store, 32) == preview
    many = Image.open(preview.path).size
    assert many[0] == few[0]
    assert many[1] > 3 * (few[1] - 100)
    assert PRIOR.present(store) == set(range(8))
