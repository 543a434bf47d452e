"""Device time is shared fairly among subjects; images of one subject are drawn in a batch."""

from __future__ import annotations

import asyncio

from serve.engine.scheduler import FairScheduler, Job
from serve.request import GenerationRequest


def job(subject: str, steps: int = 10, number: int = 0, negative: str | None = None) -> Job:
    request = GenerationRequest(subject, "1", "a cat", negative, 32, 32, steps, 4.0, seeds=(number,))
    return Job(request, number, {}, asyncio.Queue())


def served(scheduler: FairScheduler, size: int = 1) -> list[str]:
    taken = []
    while len(scheduler):
        batch = scheduler.take(size)
        taken.append(f"{batch[0].request.subject}{len(batch) if size > 1 else ''}")
    return taken


def test_a_burst_of_one_subject_does_not_delay_another() -> None:
    scheduler = FairScheduler()
    for _ in range(20):
        scheduler.add(job("burst"))
    assert [scheduler.take(1)[0].request.subject for _ in range(3)] == ["burst"] * 3
    scheduler.add(job("late"))
    assert "late" in [scheduler.take(1)[0].request.subject for _ in range(2)]


def test_fairness_counts_device_time_not_images() -> None:
    scheduler = FairScheduler()
    for _ in range(4):
        scheduler.add(job("long", steps=30))
    for _ in range(12):
        scheduler.add(job("short", steps=10))
    taken = served(scheduler)[:8]
    assert taken.count("short") in (5, 6, 7)


def test_a_subject_that_returns_at_once_gains_nothing() -> None:
    scheduler = FairScheduler()
    for _ in range(10):
        scheduler.add(job("waiting"))
    scheduler.add(job("returning", steps=100))
    taken = []
    for _ in range(10):
        [one] = scheduler.take(1)
        taken.append(one.request.subject)
        if one.request.subject == "returning":
            scheduler.add(job("returning", steps=100))
    assert taken.count("returning") <= 2


def test_a_subject_that_was_idle_does_not_take_over_the_device() -> None:
    scheduler = FairScheduler()
    for _ in range(50):
        scheduler.add(job("steady"))
    for _ in range(30):
        scheduler.take(1)
    for _ in range(20):
        scheduler.add(job("new"))
    first = [scheduler.take(1)[0].request.subject for _ in range(10)]
    assert 4 <= first.count("new") <= 6


def test_a_batch_holds_one_subject_and_kind_oldest_first() -> None:
    scheduler = FairScheduler()
    jobs = [job("cat", number=0), job("cat", steps=20), job("dog"), job("cat", number=1), job("cat", negative="bad")]
    for one in jobs:
        scheduler.add(one)
    assert scheduler.take(8) == [jobs[0], jobs[3]]
    assert served(scheduler, 8) == ["dog1", "cat1", "cat1"]


def test_a_batch_is_bounded() -> None:
    scheduler = FairScheduler()
    for number in range(5):
        scheduler.add(job("cat", number=number))
    assert [len(scheduler.take(2)) for _ in range(3)] == [2, 2, 1]


def test_a_removed_job_is_not_drawn_and_nothing_is_left_behind() -> None:
    scheduler = FairScheduler()
    one, other = job("cat"), job("dog")
    scheduler.add(one)
    scheduler.add(other)
    scheduler.remove(one)
    scheduler.remove(one)
    assert scheduler.take(8) == [other]
    assert len(scheduler) == 0
    for number in range(1000):
        scheduler.add(job(f"subject{number}"))
        scheduler.take(1)
    assert len(vars(scheduler)["_used"]) <= 1
