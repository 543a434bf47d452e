"""Sets of pictures to score: what names them, their seeds, their shards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreambooth.common.location import Location
from dreambooth.metrics.evaluation_set import EvaluationSet
from dreambooth.sampling.sampler import SamplerSettings

SAMPLER = SamplerSettings(resolution=8, steps=2, guidance=4.0, batch=4, threads=1, precision="fp32")
SET = EvaluationSet(
    subject="rex",
    version="1" * 12,
    phrase="sks dog",
    class_noun="dog",
    templates=("a {subject} in the snow", "a red {subject}"),
    images_a_prompt=6,
    class_images=5,
    samplers=(SAMPLER,),
    seed=0,
)


def test_shards_hold_each_prompts_pictures_and_those_of_the_class_once() -> None:
    assert [(template, len(indices)) for template, indices in SET.shards] == [
        *(("a {subject} in the snow", 4), ("a {subject} in the snow", 2)),
        *(("a red {subject}", 4), ("a red {subject}", 2)),
        *((None, 4), (None, 1)),
    ]
    assert SET.count == sum(len(indices) for _, indices in SET.shards) == 17
    assert [SET.prompt(template) for template in (*SET.templates, None)] == [
        *("a sks dog in the snow", "a red sks dog"), "a dog"
    ]  # fmt: skip
    assert len(replace(SET, class_images=0).shards) == 4


def test_versions_and_methods_share_seeds_and_prompts_do_not() -> None:
    other = replace(SET, version="2" * 12, phrase="sks")
    assert other.key != SET.key
    assert [other.seeds(shard) for shard in range(6)] == [SET.seeds(shard) for shard in range(6)]
    seeds = [seed for shard in range(6) for seed in SET.seeds(shard)]
    assert len(set(seeds)) == len(seeds)
    assert replace(SET, seed=1).seeds(0) != SET.seeds(0)


def test_pictures_come_back_by_template_once_all_are_there(tmp_path: Path) -> None:
    root, draws = Location.of(tmp_path), np.random.default_rng(0)
    drawn: dict[str | None, list[Image.Image]] = {}
    for shard, (template, indices) in reversed(list(enumerate(SET.shards))):
        with pytest.raises(FileNotFoundError):
            SET.pictures(root)
        pictures = [Image.fromarray(draws.integers(0, 256, (8, 8, 3), np.uint8)) for _ in indices]
        SET.write_shard(root, shard, pictures)
        drawn[template] = pictures + drawn.get(template, [])
        assert min(SET.present(root)) == shard
    found = SET.pictures(root)
    assert list(found) == [*SET.templates, None]
    for template, pictures in drawn.items():
        assert [one.tobytes() for one in found[template]] == [one.tobytes() for one in pictures]
