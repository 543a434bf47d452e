"""Which failures a run, or its lane, is given up for."""

from __future__ import annotations

from pipelines.training.run_queue import TRIES, LaneQueue


def test_lanes_share_runs_and_take_each_once() -> None:
    queue = LaneQueue(3)
    assert [queue.take(0), queue.take(1)] == [0, 1]
    queue.finish(1)
    assert queue.take(1) == 2
    queue.finish(0)
    queue.finish(1, "not finite")
    assert [queue.take(0), queue.take(1)] == [None, None]
    assert queue.outcomes() == {0: None, 1: None, 2: "not finite"}


def test_a_run_whose_workers_fail_each_time_is_given_up_and_the_next_begins_anew() -> None:
    queue = LaneQueue(2)
    for _ in range(TRIES):
        assert queue.take(0) == 0
        queue.failing(0, "out of memory")
        assert queue.failed(0)
    assert queue.take(0) == 1
    assert str(queue.outcomes()[0]) == f"its workers failed {TRIES} times, the last time so: out of memory"
    assert queue.failed(0)
    assert queue.take(0) == 1


def test_workers_begun_anew_or_taken_away_are_no_failure_of_the_run() -> None:
    queue = LaneQueue(1)
    assert [queue.take(0) for _ in range(2 * TRIES)] == [0] * 2 * TRIES
    for _ in range(2 * TRIES):
        queue.mark_preempted(0)
        assert queue.failed(0)
        assert queue.take(0) == 0


def test_workers_that_are_taken_away_may_be_told_of_until_new_ones_take_the_run() -> None:
    queue = LaneQueue(1)
    assert queue.take(0) == 0
    queue.mark_preempted(0)
    assert all(queue.failed(0) for _ in range(2 * TRIES))
    assert queue.take(0) == 0
    assert all(queue.failed(0) for _ in range(TRIES))
    assert queue.take(0) is None


def test_a_lane_whose_workers_never_take_a_run_is_given_up() -> None:
    queue = LaneQueue(2)
    assert queue.failed(0)
    assert queue.take(0) == 0
    queue.finish(0)
    assert [queue.failed(0) for _ in range(TRIES)] == [True] * (TRIES - 1) + [False]
    assert queue.take(1) == 1
