from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dreambooth.common.streams import image_seed, integer, normal, shuffled, stream, turn
from tests.conftest import ROOT

KEYS = st.lists(st.integers() | st.text(), max_size=4).map(tuple)

DRAWS = """
import json
from dreambooth.common.streams import image_seed, integer, normal, shuffled
print(json.dumps([
    normal((2, 2), 0, "corgi", "noise", 3, 1).flatten().tolist(),
    [integer(1000, 0, "corgi", "t", step) for step in range(6)],
    [shuffled(position, 4, 7, "corgi") for position in range(12)],
    [image_seed("a dog", index) for index in range(3)],
]))
"""
GOLDEN = [
    [0.1425784, 0.2367808, 0.553381, 0.031382],
    [266, 30, 686, 709, 264, 775],
    [3, 1, 0, 2, 0, 2, 3, 1, 0, 1, 2, 3],
    [422660408, 422660409, 422660410],
]


@pytest.mark.long
@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_draws_are_the_same_in_every_process(hash_seed: str) -> None:
    environment = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
    output = subprocess.run([sys.executable, "-c", DRAWS], env=environment, capture_output=True, text=True, check=True)
    noise, *exact = json.loads(output.stdout)
    assert noise == pytest.approx(GOLDEN[0], abs=1e-6)
    assert exact == GOLDEN[1:]


@given(KEYS, KEYS)
def test_a_stream_is_a_function_of_its_key_alone(key: tuple[int | str, ...], other: tuple[int | str, ...]) -> None:
    first = normal((3,), *key)
    normal((5,), *other)
    np.random.default_rng().random()
    torch.rand(3)
    assert torch.equal(first, normal((3,), *key))
    assert torch.equal(first, normal((3,), *other)) is (key == other)


def test_equal_looking_keys_are_different_keys() -> None:
    keys = [("a", 1), ("a", "1"), ("a1",), ("a, 1",), ("a", 1, ""), (1, "a"), ("a", -1), ("a", 11)]
    assert len({integer(2**62, *key) for key in keys}) == len(keys)


def test_neighbouring_keys_are_uncorrelated() -> None:
    rows = np.stack([normal((4000,), 0, "dog", step, sample).numpy() for step in range(8) for sample in range(4)])
    assert abs(rows.mean()) < 0.02
    assert abs(rows.std() - 1) < 0.02
    between = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(between).max() < 0.08  # 5 standard deviations of independent draws


def test_noise_is_float32_of_the_shape_asked_for() -> None:
    noise = normal(torch.Size((2, 3, 1)), "any")
    assert (noise.dtype, noise.shape) == (torch.float32, (2, 3, 1))


@given(st.integers(1, 10**6), KEYS)
def test_integers_are_in_range(high: int, key: tuple[int | str, ...]) -> None:
    assert 0 <= integer(high, *key) < high


def test_integers_reach_every_value() -> None:
    counts = np.bincount([integer(10, "t", step) for step in range(2000)], minlength=10)
    assert counts.min() > 130


@given(st.integers(1, 40), st.integers(0, 50), KEYS)
def test_each_pass_visits_each_item_once(count: int, number: int, key: tuple[int | str, ...]) -> None:
    visited = [shuffled(number * count + offset, count, *key) for offset in range(count)]
    assert sorted(visited) == list(range(count))


def test_passes_have_orders_of_their_own() -> None:
    orders = {tuple(shuffled(number * 6 + offset, 6, "dog") for offset in range(6)) for number in range(20)}
    assert len(orders) > 15


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 40), KEYS)
def test_each_pass_gives_each_group_its_share_of_turns(
    shares: list[int], passes: int, key: tuple[int | str, ...]
) -> None:
    whole = sum(shares)
    turns = [turn(passes * whole + offset, shares, *key) for offset in range(whole)]
    for group, share in enumerate(shares):
        # How many turns a group had before counts on from pass to pass, without a gap.
        visits = [visit for chosen, visit in turns if chosen == group]
        assert visits == list(range(passes * share, (passes + 1) * share))


def test_a_group_alone_has_every_turn() -> None:
    assert [turn(position, [4], "dog") for position in range(9)] == [(0, position) for position in range(9)]


def test_turns_come_in_an_order_of_their_own_in_every_pass() -> None:
    orders = {tuple(turn(number * 6 + offset, [2, 1, 3], "dog")[0] for offset in range(6)) for number in range(30)}
    assert len(orders) > 10


@given(st.text(), st.integers(0, 2**33), st.integers(1, 200))
def test_image_seeds_differ_within_a_set_and_have_32_bits(key: str, first: int, count: int) -> None:
    seeds = [image_seed(key, index) for index in range(first, first + count)]
    assert len(set(seeds)) == count
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_sets_have_seeds_of_their_own() -> None:
    assert len({image_seed(f"set {number}", 0) for number in range(1000)}) == 1000


def test_torch_draws_differ_wherever_32_bits_of_the_seed_do() -> None:
    def draw(seed: int) -> tuple[float, ...]:
        return tuple(torch.randn(4, generator=torch.Generator().manual_seed(seed)).tolist())

    assert len({draw(image_seed("a dog", index)) for index in range(300)}) == 300
    assert draw(7) == draw(7 + 2**32), "torch now keeps more bits: image seeds may be wider"


def test_two_draws_of_one_generator_differ() -> None:
    generator = stream("any")
    assert generator.random() != generator.random()
