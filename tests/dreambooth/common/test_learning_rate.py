"""The learning rate over the steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreambooth.common.learning_rate import Schedule, learning_rate_factor

SCHEDULES: tuple[Schedule, ...] = ("constant", "cosine", "linear")


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(steps=st.integers(1, 300), data=st.data())
def test_it_rises_once_to_one_and_never_rises_again(schedule: Schedule, steps: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, steps - 1))
    factors = [learning_rate_factor(step, steps, warmup, schedule) for step in range(steps)]
    assert factors[warmup] == 1
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[: warmup + 1] == sorted(factors[: warmup + 1])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)


def test_half_way_down_cosine_and_linear_are_at_a_half() -> None:
    assert learning_rate_factor(60, 110, 10, "linear") == pytest.approx(0.5)
    assert learning_rate_factor(60, 110, 10, "cosine") == pytest.approx(0.5)
    assert learning_rate_factor(60, 110, 10, "constant") == 1
    assert learning_rate_factor(35, 110, 10, "cosine") == pytest.approx(0.8536, abs=1e-4)


def test_the_last_update_is_small() -> None:
    assert learning_rate_factor(99, 100, 0, "linear") == pytest.approx(0.01)
    assert learning_rate_factor(99, 100, 0, "cosine") < 0.001
