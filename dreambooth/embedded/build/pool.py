"""Pools of rendered scenes: pictures in one memory-mapped array, captions and individuals beside it.

A pool is made once and read by every training stage. Scene i of a pool depends on (seed, i) alone, so several
processes render it, and an interrupted rendering goes on where it stopped.
"""

import contextlib
import json
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dreambooth.embedded.build.training import Clock, OutOfTimeError
from dreambooth.embedded.instances import Instance
from dreambooth.embedded.scenes import Scene, Sprites, caption, compose, render, sample_scene
from dreambooth.embedded.vocabulary import NOUNS

CHUNK = 2000
Sampler = Callable[[Sprites, int, int], Scene]


class Pool(NamedTuple):
    """Pictures uint8 (N, size, size, 3), with their captions and one identity number an individual."""

    images: np.ndarray
    captions: list[str]
    nouns: list[str]
    individuals: np.ndarray


def for_pretraining(sprites: Sprites, seed: int, index: int) -> Scene:
    """Scenes of all kinds, without the held-out combinations and drawings."""
    return sample_scene(sprites, seed, index)


def held_out_captions(sprites: Sprites, seed: int, index: int) -> Scene:
    """Scenes of the caption combinations that pretraining never shows."""
    return sample_scene(sprites, seed, index, held_out=True)


def for_judging(sprites: Sprites, seed: int, index: int) -> Scene:
    """Scenes of all kinds and combinations: a judge that had never seen one would not believe in it."""
    return sample_scene(sprites, seed, index, held_out=None)


def pairs(sprites: Sprites, seed: int, index: int) -> Scene:
    """Scenes 2k and 2k + 1 show one individual, in its own colours and shape, in two places."""
    who = np.random.default_rng([seed, index // 2, 0])
    words = [word for word in NOUNS if word in sprites.nouns]
    noun = words[int(who.integers(len(words)))]
    individual = Instance.sample(noun, str(who.choice(sprites.drawings(noun))), who)
    where = np.random.default_rng([seed, index, 1])
    while True:
        scene = compose(individual, where)
        if scene.colour is None and scene.look is None and scene.style is None:
            return scene


def make_pool(
    sprites: Path, folder: Path, sampler: Sampler, seed: int, count: int, workers: int, size: int, clock: Clock
) -> Pool:
    """Render `count` scenes into `folder` with some processes, or finish doing so; return the pool.

    Raises `OutOfTimeError` when the clock runs out, with whole chunks kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        (sprites, folder, sampler, seed, start, min(start + CHUNK, count), size)
        for start in range(0, count, CHUNK)
        if not _chunk(folder, start).with_suffix(".json").exists()
    ]
    with contextlib.ExitStack() as stack:
        finished: Iterator[None] = map(_render_chunk, jobs)
        if workers > 1 and len(jobs) > 1:
            processes = stack.enter_context(multiprocessing.get_context("spawn").Pool(workers))
            finished = processes.imap_unordered(_render_chunk, jobs)
        for number, _ in enumerate(finished, start=1):
            if clock.expired() and number < len(jobs):
                raise OutOfTimeError(f"{number} of {len(jobs)} chunks rendered into {folder.name}")
    return read_pool(folder, count, size)


def read_pool(folder: Path, count: int, size: int) -> Pool:
    """The pool as one array, joined once from its chunks and memory-mapped from then on."""
    starts = range(0, count, CHUNK)
    rows = [row for start in starts for row in json.loads(_chunk(folder, start).with_suffix(".json").read_text())]
    rows = rows[:count]
    if len(rows) < count:
        raise ValueError(f"{folder} was rendered for fewer than {count} scenes: delete it and build again")
    joined = folder / f"images-{count}.npy"
    if not joined.exists():
        target = np.lib.format.open_memmap(
            joined.with_suffix(".part"), mode="w+", dtype=np.uint8, shape=(count, size, size, 3)
        )
        for start in starts:
            part = np.load(_chunk(folder, start))
            target[start : start + len(part)] = part[: count - start]
        target.flush()
        joined.with_suffix(".part").rename(joined)
    numbers: dict[str, int] = {}
    individuals = np.array([numbers.setdefault(row["individual"], len(numbers)) for row in rows])
    # Copy-on-write: tensors take no read-only memory.
    images = np.load(joined, mmap_mode="c")
    return Pool(images, [row["caption"] for row in rows], [row["noun"] for row in rows], individuals)


def _chunk(folder: Path, start: int) -> Path:
    return folder / f"chunk-{start:07d}.npy"


def _render_chunk(job: tuple[Path, Path, Sampler, int, int, int, int]) -> None:
    folder, out, sampler, seed, start, stop, size = job
    sprites = Sprites.load(folder)
    scenes = [sampler(sprites, seed, index) for index in range(start, stop)]
    np.save(_chunk(out, start), np.stack([render(scene, sprites, size) for scene in scenes]))
    rows = [{"caption": caption(s), "noun": s.instance.noun, "individual": repr(s.instance)} for s in scenes]
    # Written last: its presence says that the chunk is whole.
    _chunk(out, start).with_suffix(".json").write_text(json.dumps(rows))
