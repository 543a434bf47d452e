"""Subjects keep to their replicas, in equal shares, until a queue grows long."""

from __future__ import annotations

from collections import Counter

from serve.ingress.router import HotSubjects, SubjectPlacement, by_cost

REPLICAS = ["a", "b", "c"]


def test_a_subject_has_one_home() -> None:
    homes = SubjectPlacement()
    first = {f"subject{i}@1": homes.ranked(f"subject{i}@1", REPLICAS) for i in range(50)}
    assert all(sorted(ranked) == REPLICAS for ranked in first.values())
    assert all(homes.ranked(model, reversed_) == first[model] for model in first for reversed_ in [REPLICAS[::-1]])


def test_homes_are_shared_out_evenly() -> None:
    for number in (3, 12, 200):
        homes = SubjectPlacement()
        counts = Counter(homes.ranked(f"subject{i}@1", REPLICAS)[0] for i in range(number))
        assert max(counts.values()) <= -(-number // 3)


def test_a_lost_replica_moves_its_own_subjects_alone() -> None:
    homes = SubjectPlacement()
    models = [f"subject{i}@1" for i in range(30)]
    before = {model: homes.ranked(model, REPLICAS)[0] for model in models}
    after = {model: homes.ranked(model, ["a", "c"])[0] for model in models}
    assert [model for model in models if before[model] != after[model]] == [m for m in models if before[m] == "b"]
    assert max(Counter(after.values()).values()) <= 15


def test_a_long_queue_at_home_sends_requests_to_the_next() -> None:
    assert by_cost(["a", "b", "c"], {"a": 4, "b": 0, "c": 0}, escape=4) == ["a", "b", "c"]
    assert by_cost(["a", "b", "c"], {"a": 5, "b": 0, "c": 0}, escape=4) == ["b", "a", "c"]
    assert by_cost(["a", "b", "c"], {"a": 9, "b": 9, "c": 0}, escape=4) == ["c", "a", "b"]


def test_subjects_stay_at_home_while_all_queues_are_equally_long() -> None:
    assert by_cost(["a", "b", "c"], {"a": 30, "b": 29, "c": 28}, escape=4) == ["a", "b", "c"]


def test_a_subject_is_hot_while_it_asks_for_more_than_a_replicas_share() -> None:
    demand = HotSubjects()
    for number in range(300):
        demand.note("hot" if number % 2 else f"cold{number}")
    assert demand.is_hot("hot", replicas=3)
    assert not demand.is_hot("hot", replicas=2)
    assert not demand.is_hot("cold0", replicas=100)
    for number in range(300):
        demand.note(f"other{number}")
    assert not demand.is_hot("hot", replicas=3)


def test_a_few_orders_make_no_subject_hot() -> None:
    demand = HotSubjects()
    for _ in range(20):
        demand.note("new")
    assert not demand.is_hot("new", replicas=3)
    demand.note("new")
    demand.note("new")
    assert demand.is_hot("new", replicas=3)
