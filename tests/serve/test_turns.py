"""Subjects take fair turns; images of one subject are drawn together."""

from __future__ import annotations

import asyncio

from serve.order import Order
from serve.turns import Job, Turns


def job(subject: str, steps: int = 10, number: int = 0, negative: str | None = None) -> Job:
    order = Order(subject, "1", "a cat", negative, 32, 32, steps, 4.0, seeds=(number,))
    return Job(order, number, {}, asyncio.Queue())


def served(turns: Turns, most: int = 1) -> list[str]:
    taken = []
    while len(turns):
        batch = turns.take(most)
        taken.append(f"{batch[0].order.subject}{len(batch) if most > 1 else ''}")
    return taken


def test_a_burst_of_one_subject_does_not_delay_another() -> None:
    turns = Turns()
    for _ in range(20):
        turns.add(job("burst"))
    assert [turns.take(1)[0].order.subject for _ in range(3)] == ["burst"] * 3
    turns.add(job("late"))
    assert "late" in [turns.take(1)[0].order.subject for _ in range(2)]


def test_turns_are_fair_by_work_not_by_number() -> None:
    turns = Turns()
    for _ in range(4):
        turns.add(job("long", steps=30))
    for _ in range(12):
        turns.add(job("short", steps=10))
    order = served(turns)[:8]
    assert order.count("short") in (5, 6, 7)


def test_a_subject_that_comes_back_at_once_gains_nothing() -> None:
    turns = Turns()
    for _ in range(10):
        turns.add(job("waiting"))
    turns.add(job("returning", steps=100))
    order = []
    for _ in range(10):
        [taken] = turns.take(1)
        order.append(taken.order.subject)
        if taken.order.subject == "returning":
            turns.add(job("returning", steps=100))
    assert order.count("returning") <= 2


def test_a_subject_that_was_away_does_not_take_the_device_over() -> None:
    turns = Turns()
    for _ in range(50):
        turns.add(job("steady"))
    for _ in range(30):
        turns.take(1)
    for _ in range(20):
        turns.add(job("new"))
    first = [turns.take(1)[0].order.subject for _ in range(10)]
    assert 4 <= first.count("new") <= 6


def test_a_batch_holds_one_subject_and_kind_oldest_first() -> None:
    turns = Turns()
    jobs = [job("cat", number=0), job("cat", steps=20), job("dog"), job("cat", number=1), job("cat", negative="bad")]
    for one in jobs:
        turns.add(one)
    assert turns.take(8) == [jobs[0], jobs[3]]
    assert served(turns, 8) == ["dog1", "cat1", "cat1"]


def test_a_batch_is_bounded() -> None:
    turns = Turns()
    for number in range(5):
        turns.add(job("cat", number=number))
    assert [len(turns.take(2)) for _ in range(3)] == [2, 2, 1]


def test_a_removed_job_is_not_drawn_and_nothing_is_left_behind() -> None:
    turns = Turns()
    one, other = job("cat"), job("dog")
    turns.add(one)
    turns.add(other)
    turns.remove(one)
    turns.remove(one)
    assert turns.take(8) == [other]
    assert len(turns) == 0
    for number in range(1000):
        turns.add(job(f"subject{number}"))
        turns.take(1)
    assert len(vars(turns)["_accounts"]) <= 1
