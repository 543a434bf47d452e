"""Counter-based random streams: every draw is a function of its key, never of who draws it or when.

A key is a tuple such as `(seed, "corgi", "noise", step, sample)`. It is hashed into the 128-bit key of a Philox
generator (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), so workers, order and resumption
cannot change it.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Key = int | str


def stream(*key: Key) -> np.random.Generator:
    """The generator of this key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))


def normal(shape: Sequence[int], *key: Key) -> Tensor:
    """Standard normal float32 noise of `shape`, on the CPU."""
    return torch.from_numpy(stream(*key).standard_normal(tuple(shape), dtype=np.float32))


def integer(high: int, *key: Key) -> int:
    """A uniform integer in [0, high)."""
    return int(stream(*key).integers(high))


def shuffled(position: int, count: int, *key: Key) -> int:
    """Which of `count` items stands at `position` of an endless sequence of shuffled passes over them."""
    passes, offset = divmod(position, count)
    return int(stream(*key, passes).permutation(count)[offset])


def turn(position: int, shares: Sequence[int], *key: Key) -> tuple[int, int]:
    """Which of several groups has its turn at `position` of an endless sequence, and how many turns it had before.

    Each pass of sum(shares) turns gives every group its share of them, in a shuffled order.
    """
    passes, offset = divmod(position, sum(shares))
    order = stream(*key, passes).permutation(np.repeat(np.arange(len(shares)), shares))
    group = int(order[offset])
    return group, passes * shares[group] + int((order[:offset] == group).sum())


def image_seed(key: str, index: int) -> int:
    """The seed of image `index` of the set `key`: 32 bits, and distinct for every image of a set.

    torch's CPU generator keeps only the low 32 bits of a seed; counting up from a hashed start cannot collide in a set.
    """
    start = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "big")
    return (start + index) % 2**32
