"""The batches of contrastive training."""

from collections import Counter

import numpy as np

from dreambooth.embedded.build.contrastive import GROUP, hard_batch, rows_alike_but_for_the_noun
from dreambooth.embedded.build.pool import Pool


def _pool(count: int = 600) -> Pool:
    rng = np.random.default_rng(0)
    nouns = [str(noun) for noun in rng.choice(["dog", "owl", "car"], count)]
    places = rng.choice(["in the snow", "at night", "wearing a rainbow scarf"], count)
    captions = [f"{'an' if noun == 'owl' else 'a'} {noun} {place}" for noun, place in zip(nouns, places, strict=True)]
    return Pool(np.zeros((count, 1, 1, 3), np.uint8), captions, nouns, np.arange(count))


def test_rows_alike_say_the_same_of_any_noun():
    pool = _pool()
    alike = rows_alike_but_for_the_noun(pool)
    for row in range(0, len(alike), 97):
        assert row in alike[row]
        ending = pool.captions[row].split(" ", 2)[2]
        assert {pool.captions[other].split(" ", 2)[2] for other in alike[row]} == {ending}
        assert {pool.nouns[other] for other in alike[row]} == {"dog", "owl", "car"}
        assert len(alike[row]) == sum(caption.endswith(ending) for caption in pool.captions)


def test_half_of_a_batch_comes_in_order_and_half_in_groups_alike():
    pool = _pool()
    alike = rows_alike_but_for_the_noun(pool)
    per_epoch = len(alike) // 32
    steps = [hard_batch(alike, 64, seed=1, step=step) for step in range(per_epoch)]
    assert all(len(rows) == 64 for rows in steps)
    assert len(set(np.concatenate([rows[:32] for rows in steps]).tolist())) == 32 * per_epoch
    for rows in steps:
        for start in (32, 48):
            endings = Counter(pool.captions[row].split(" ", 2)[2] for row in rows[start : start + GROUP])
            assert len(endings) == 1
    assert np.array_equal(steps[3], hard_batch(alike, 64, seed=1, step=3))
