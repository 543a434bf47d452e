"""DeepSpeed settings of the user's own reach the engine, belong to the run, and touch nothing that an option says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.engine.config import merged, read_deepspeed_config
from pipelines.engine.engine import engine_config
from pipelines.planning.options import parse
from pipelines.planning.plan import make_plan
from tests.pipelines.engines import Learner, lane, process_group, training


def written(folder: Path, settings: Any, name: str = "deepspeed.json") -> str:
    path = folder / name
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return str(path)


def test_settings_are_laid_over_ours_object_by_object() -> None:
    settings = {"zero_optimization": {"reduce_bucket_size": 1000}, "aio": {"thread_count": 2}}
    config = engine_config(training(), lane(deepspeed=settings), 1)
    assert config == merged(engine_config(training(), lane(), 1), settings)
    assert config["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert config["gradient_clipping"] == 1.0


def test_an_engine_obeys_them(tmp_path: Path) -> None:
    with process_group(tmp_path):
        learner = Learner(training(), lane(deepspeed={"zero_optimization": {"reduce_bucket_size": 12345}}))
        assert learner.engine.optimizer.reduce_bucket_size == 12345
        assert Learner(training(), lane()).engine.optimizer.reduce_bucket_size != 12345


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"train_batch_size": 8}, ("train_batch_size", "--batch")),
        ({"train_micro_batch_size_per_gpu": "auto"}, ("train_micro_batch_size_per_gpu", "--batch")),
        ({"gradient_accumulation_steps": 2}, ("gradient_accumulation_steps", "--gradient-accumulation")),
        ({"gradient_clipping": 1.0}, ("gradient_clipping", "--max-grad-norm")),
        ({"optimizer": {"type": "AdamW"}}, ("optimizer", "--optimizer")),
        ({"scheduler": {"type": "WarmupLR"}}, ("scheduler", "--schedule")),
        ({"bf16": {"enabled": True}}, ("bf16", "--precision")),
        ({"fp16": {"enabled": True}}, ("fp16", "--precision")),
        ({"zero_optimization": {"stage": 3}}, ("zero_optimization.stage 3", "--zero-stage 2")),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            ("zero_optimization.offload_optimizer.device", "--offload"),
        ),
        ({"zero_optimization": {"reduce_bucket_size": "large"}}, ("zero_optimization.reduce_bucket_size", "integer")),
        ({"zero_optimization": 2}, ("zero_optimization", "object")),
        ([1], ("expected an object", "list")),
        ("{", ("deepspeed.json",)),
    ],
)
def test_what_is_not_theirs_to_say_is_an_error_that_names_it(
    tmp_path: Path, settings: Any, says: tuple[str, ...]
) -> None:
    path = written(tmp_path, settings)
    with pytest.raises(ValueError, match="--deepspeed") as error:
        read_deepspeed_config(path, zero_stage=2)
    for text in (path, *says):
        assert text in str(error.value)


def test_a_file_that_repeats_the_stage_is_taken(tmp_path: Path) -> None:
    settings = {"zero_optimization": {"stage": 2, "overlap_comm": False}}
    assert read_deepspeed_config(written(tmp_path, settings), zero_stage=2) == settings


def test_the_content_belongs_to_the_run_and_the_path_does_not(photos: Path, small_sdxl: Path, tmp_path: Path) -> None:
    def key(*more: str) -> str:
        arguments = ["--images", str(photos), "--class-noun", "mug", "--backbone", str(small_sdxl), "--dry-run"]
        [planned] = make_plan(parse([*arguments, "--store", str(tmp_path / "store"), *more], "")).subjects
        return planned.run.key

    bucket = {"zero_optimization": {"reduce_bucket_size": 1000}}
    here, there = written(tmp_path, bucket), written(tmp_path, bucket, "again.json")
    other = written(tmp_path, {"zero_optimization": {"reduce_bucket_size": 2000}}, "other.json")
    assert key("--deepspeed", here) == key("--deepspeed", there)
    assert len({key(), key("--deepspeed", here), key("--deepspeed", other)}) == 3
