"""Drawing ahead changes when rows are drawn, and nothing else."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from pipelines.training.batches import Minibatch
from pipelines.training.prefetch import Prefetch

SAMPLES = [range(0, 2), range(2, 4)]


class Batches:
    """Rows that tell their step and samples, and note who drew them when."""

    def __init__(self) -> None:
        self.drawn: list[int] = []
        self.threads: set[str] = set()
        self.changed = threading.Condition()

    def rows(self, step: int, samples: range) -> list[Minibatch]:
        if step == 7:
            raise ArithmeticError("step 7 cannot be drawn")
        with self.changed:
            self.drawn.append(step)
            self.threads.add(threading.current_thread().name)
            self.changed.notify_all()
        x = torch.tensor([[float(step), sample] for sample in samples])
        return [Minibatch(x, x + 1, x[:, 0].long(), {"size": x + 2}, {"ids": x.long()})]

    def wait_for(self, told: Callable[[], bool]) -> bool:
        with self.changed:
            return self.changed.wait_for(told, timeout=60)


def test_every_step_has_its_own_rows_and_the_next_is_drawn_ahead() -> None:
    batches = Batches()
    with Prefetch(batches, SAMPLES, steps=5, device=torch.device("cpu")) as ahead:
        for step in (2, 3, 3, 4):  # begun after a checkpoint, and one step done again
            for samples in SAMPLES:
                [half] = ahead.rows(step, samples)
                assert half.x.tolist() == [[step, sample] for sample in samples]
                assert half.conditioning["size"].equal(half.x + 2)
            coming = min(step + 1, 4)
            assert batches.wait_for(lambda coming=coming: batches.drawn.count(coming) == len(SAMPLES))  # type: ignore[misc]
    assert sorted(batches.drawn) == [2, 2, 3, 3, 4, 4]
    assert "MainThread" not in batches.threads


def test_what_drawing_fails_by_is_raised_where_the_rows_are_wanted() -> None:
    with Prefetch(Batches(), SAMPLES, steps=9, device=torch.device("cpu")) as ahead:
        ahead.rows(6, SAMPLES[0])
        with pytest.raises(ArithmeticError, match="step 7"):
            ahead.rows(7, SAMPLES[0])
