"""Pools of actors: rows whose actor dies are given to another, and what dies at every start ends the run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import ray

from pipelines.runtime import actor_pools
from pipelines.runtime.actor_pools import map_on_actors
from tests.pipelines.runtime.dying import Dies
from tests.prior_sets import LANE

pytestmark = pytest.mark.usefixtures("local_ray")


def tries_of(notes: Path) -> Counter[str]:
    return Counter(notes.read_text().split())


def test_a_row_whose_actor_dies_is_given_to_another(tmp_path: Path) -> None:
    rows = [{"number": number} for number in range(3)]
    done = list(map_on_actors("dies", rows, Dies, (str(tmp_path / "notes"), 1), LANE, 1))
    assert sorted(row["number"] for row in done) == [0, 1, 2]
    assert tries_of(tmp_path / "notes") == {"0": 2, "1": 2, "2": 2}


def test_an_actor_that_dies_at_every_start_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor_pools, "_DEATHS", 2)
    with pytest.raises(ray.exceptions.RayError, match="Dies: its processes or nodes died too often"):
        list(map_on_actors("dies", [{"number": 0}], Dies, (str(tmp_path / "notes"), 1000), LANE, 1))
    assert tries_of(tmp_path / "notes") == {"0": 3}
