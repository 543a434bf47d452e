"""The replica: batches, fairness, loading while sampling, cancellation, and health checks."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreambooth.store import SubjectStore, Version
from serve.engine.replica import SubjectReplica, preview_after
from serve.request import BadRequest, DrawnImage, GenerationRequest
from tests.serve.published import DOG, MUG, OLD_MUG

pytestmark = pytest.mark.anyio
REQUEST = GenerationRequest(*MUG, "a sks mug", None, 32, 32, steps=3, guidance=4.0, seeds=(1,))
OTHER_REQUEST = replace(REQUEST, subject=DOG[0], version=DOG[1])

Make = Callable[..., SubjectReplica]


@pytest.fixture
def make(store: SubjectStore, versions: list[Version], tmp_path: Path) -> Make:
    def build(**options: object) -> SubjectReplica:
        settings: dict[str, object] = {
            **{"precision": "fp32", "device": "cpu", "threads": 1, "batch": 1, "host_memory": 2**30, "keep": ()},
            **{"disk": str(tmp_path), "disk_space": 2**30, "wedged_after": 60.0},
            **options,
        }
        return SubjectReplica(store.root.uri, versions[0].manifest["backbone"]["hash"], **settings)  # type: ignore[arg-type]

    return build


class Steps:
    """Counts the steps of a replica, and blocks them while `gate` is closed."""

    def __init__(self, replica: SubjectReplica) -> None:
        self.taken = 0
        self.gate = threading.Event()
        self.gate.set()
        self._hook = replica._pipeline.pipeline.unet.register_forward_pre_hook(self._on_step)

    def _on_step(self, *_: object) -> None:
        self.taken += 1
        assert self.gate.wait(30)


@pytest.fixture
def replica(make: Make) -> SubjectReplica:
    return make(batch=4)


@pytest.fixture
def steps(replica: SubjectReplica) -> Iterator[Steps]:
    steps = Steps(replica)
    yield steps
    steps.gate.set()


async def draw(replica: SubjectReplica, request: GenerationRequest) -> list[DrawnImage]:
    return [drawn async for drawn in replica.draw(request)]


def pixels(drawn: DrawnImage) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(drawn.png))).astype(int)


async def reach(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_waiting_images_of_a_subject_are_drawn_together(replica: SubjectReplica, steps: Steps) -> None:
    alone = [(await draw(replica, replace(REQUEST, seeds=(seed,))))[0] for seed in (1, 2, 3)]
    steps.gate.clear()
    first = asyncio.create_task(draw(replica, OTHER_REQUEST))
    before = steps.taken
    await reach(lambda: steps.taken > before)
    requests = [asyncio.create_task(draw(replica, replace(REQUEST, seeds=seeds))) for seeds in ((1, 2), (3,))]
    await reach(lambda: len(replica._scheduler) == 3)
    steps.gate.set()
    together = [drawn for request in requests for drawn in sorted(await request, key=lambda drawn: drawn.number)]
    assert [drawn.batch for drawn in together] == [3, 3, 3]
    for one, other in zip(together, alone, strict=True):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1
    assert np.abs(pixels(alone[0]) - pixels(alone[1])).max() > 10
    await first


async def test_a_version_is_loaded_while_another_is_drawn(replica: SubjectReplica, steps: Steps) -> None:
    steps.gate.clear()
    first = asyncio.create_task(draw(replica, REQUEST))
    await reach(lambda: steps.taken > 0)
    second = asyncio.create_task(draw(replica, OTHER_REQUEST))
    await reach(lambda: len(replica._scheduler) == 1)  # loaded, and waiting for the device
    assert not first.done()
    steps.gate.set()
    await first
    await second


async def test_a_burst_does_not_delay_another_subject(make: Make) -> None:
    replica = make()
    burst = asyncio.create_task(draw(replica, replace(REQUEST, seeds=tuple(range(10)), steps=10)))
    await reach(lambda: len(replica._scheduler) > 0)
    await draw(replica, replace(OTHER_REQUEST, steps=10))
    assert len(replica._scheduler) >= 5
    await burst


async def test_a_cancelled_request_ends_after_the_step(replica: SubjectReplica, steps: Steps) -> None:
    images: AsyncIterator[DrawnImage] = replica.draw(replace(REQUEST, steps=200, previews=3, seeds=tuple(range(10))))
    assert (await anext(images)).preview == 0
    await images.aclose()  # type: ignore[attr-defined]
    await draw(replica, OTHER_REQUEST)
    assert steps.taken < 150
    assert (len(replica._scheduler), replica._host.bytes > 0) == (0, True)


async def test_previews_come_before_their_image(replica: SubjectReplica) -> None:
    drawn = await draw(replica, replace(REQUEST, steps=8, previews=3, seeds=(1, 2)))
    for number in (0, 1):
        assert [one.preview for one in drawn if one.number == number] == [0, 1, 2, None]


def test_previews_divide_the_steps() -> None:
    def due(steps: int, previews: int) -> list[int]:
        request = replace(REQUEST, steps=steps, previews=previews)
        return [step for step in range(steps) if preview_after(step, request) is not None]

    assert (due(50, 0), due(50, 1), due(40, 3)) == ([], [24], [9, 19, 29])
    assert due(2, 3) == [0]


async def test_a_bad_request_loads_no_weights(replica: SubjectReplica, steps: Steps) -> None:
    for bad in (replace(REQUEST, width=33), replace(REQUEST, width=96), replace(REQUEST, prompt="tree " * 100)):
        with pytest.raises(BadRequest):
            await draw(replica, bad)
    assert (steps.taken, replica._host.bytes) == (0, 0)


async def test_a_version_that_was_removed_fails_its_request_alone(replica: SubjectReplica) -> None:
    with pytest.raises(LookupError, match="mug@gone"):
        await draw(replica, replace(REQUEST, version="gone"))
    assert await draw(replica, REQUEST)


async def test_a_stuck_device_is_noticed(make: Make) -> None:
    replica = make(wedged_after=0.3)
    steps = Steps(replica)
    replica.check_health()
    steps.gate.clear()
    drawing = asyncio.create_task(draw(replica, REQUEST))
    await reach(lambda: steps.taken > 0)
    replica.check_health()
    await asyncio.sleep(0.5)
    with pytest.raises(RuntimeError, match="has not finished a step"):
        replica.check_health()
    steps.gate.set()
    await drawing
    await asyncio.sleep(0.5)
    replica.check_health()  # idle is not stuck


async def test_models_to_keep_are_loaded_at_the_start(make: Make) -> None:
    replica = make(keep=("mug", "dog@" + DOG[1], "unknown"))
    await reach(lambda: MUG in replica._host and DOG in replica._host)
    assert OLD_MUG not in replica._host
