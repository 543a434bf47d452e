"""Subjects stay on their replicas, in equal shares, until a queue grows long."""

from __future__ import annotations

from collections import Counter

from serve.ingress.router import HotSubjects, SubjectPlacement, by_cost

REPLICAS = ["a", "b", "c"]


def test_a_subject_is_assigned_to_one_replica() -> None:
    placement = SubjectPlacement()
    first = {f"subject{i}@1": placement.ranked(f"subject{i}@1", REPLICAS) for i in range(50)}
    assert all(sorted(ranked) == REPLICAS for ranked in first.values())
    assert all(placement.ranked(model, reversed_) == first[model] for model in first for reversed_ in [REPLICAS[::-1]])


def test_subjects_are_assigned_evenly() -> None:
    for number in (3, 12, 200):
        placement = SubjectPlacement()
        counts = Counter(placement.ranked(f"subject{i}@1", REPLICAS)[0] for i in range(number))
        assert max(counts.values()) <= -(-number // 3)


def test_a_lost_replica_moves_its_own_subjects_alone() -> None:
    placement = SubjectPlacement()
    models = [f"subject{i}@1" for i in range(30)]
    before = {model: placement.ranked(model, REPLICAS)[0] for model in models}
    after = {model: placement.ranked(model, ["a", "c"])[0] for model in models}
    assert [model for model in models if before[model] != after[model]] == [m for m in models if before[m] == "b"]
    assert max(Counter(after.values()).values()) <= 15


def test_a_long_queue_sends_requests_to_the_next_replica() -> None:
    assert by_cost(["a", "b", "c"], {"a": 4, "b": 0, "c": 0}, escape=4) == ["a", "b", "c"]
    assert by_cost(["a", "b", "c"], {"a": 5, "b": 0, "c": 0}, escape=4) == ["b", "a", "c"]
    assert by_cost(["a", "b", "c"], {"a": 9, "b": 9, "c": 0}, escape=4) == ["c", "a", "b"]


def test_subjects_stay_on_their_replicas_while_all_queues_are_equally_long() -> None:
    assert by_cost(["a", "b", "c"], {"a": 30, "b": 29, "c": 28}, escape=4) == ["a", "b", "c"]


def test_a_subject_is_hot_while_it_asks_for_more_than_a_replicas_share() -> None:
    hot = HotSubjects()
    for number in range(300):
        hot.note("hot" if number % 2 else f"cold{number}")
    assert hot.is_hot("hot", replicas=3)
    assert not hot.is_hot("hot", replicas=2)
    assert not hot.is_hot("cold0", replicas=100)
    for number in range(300):
        hot.note(f"other{number}")
    assert not hot.is_hot("hot", replicas=3)


def test_a_few_requests_make_no_subject_hot() -> None:
    hot = HotSubjects()
    for _ in range(20):
        hot.note("new")
    assert not hot.is_hot("new", replicas=3)
    hot.note("new")
    hot.note("new")
    assert hot.is_hot("new", replicas=3)
