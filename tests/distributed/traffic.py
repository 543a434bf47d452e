"""Many subjects behind one endpoint, and clients that ask for them and know each one's own image."""

from __future__ import annotations

import base64
import io
import json
import random
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from ray import serve

from dreambooth.backbones import open_backbone
from dreambooth.store import SubjectStore
from serve.app import app
from serve.config import GIB, ServeConfig
from tests.serve.published import publish

SEED = 3


@dataclass(frozen=True)
class Subjects:
    """Published subjects, the image that each one's weights alone make, and the bytes that its weights take."""

    store: SubjectStore
    images: dict[str, np.ndarray]
    size: int

    def room(self, count: int) -> float:
        """GiB of host memory in which so many subjects fit."""
        return (count + 0.5) * self.size / GIB


def publish_subjects(store: SubjectStore, folder: Path, count: int) -> Subjects:
    """Publish subjects that change the U-Net of the backbone in `folder`, and draw each with diffusers alone."""
    backbone = open_backbone(folder)
    store.add_backbone(backbone)
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    images, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)
    for number in range(count):
        subject = f"subject{number}"
        published = publish(store, backbone, subject, f"{number + 1:012}", "unet")
        pipeline.unet = UNet2DConditionModel.from_pretrained(store.local_version(published), subfolder="unet")
        drawn = pipeline(
            f"a sks {subject} on the beach",
            generator=torch.Generator().manual_seed(SEED),
            num_inference_steps=3,
            guidance_scale=4.0,
            width=32,
            height=32,
        )
        images[subject] = np.asarray(drawn.images[0])
    torch.set_num_threads(threads)
    assert len({image.tobytes() for image in images.values()}) == count
    return Subjects(store, images, sum(parameter.nbytes for parameter in pipeline.unet.parameters()))


def zipf(count: int, exponent: float = 0.8) -> list[float]:
    """How much more often the first subject is asked for than the second, and so on."""
    return [1 / rank**exponent for rank in range(1, count + 1)]


@contextmanager
def serving(subjects: Subjects, **arguments: Any) -> Iterator[str]:
    """The application over these subjects on the Ray that runs; gives its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    deploy(subjects, **arguments)
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def deploy(subjects: Subjects, **arguments: Any) -> None:
    """Deploy the application, or deploy it again, and wait until it runs."""
    serve.run(app(ServeConfig(store=subjects.store.root.uri, without_keys=True, **arguments)))


@dataclass(frozen=True)
class Answer:
    """What a client got: `right` when it is the image of the subject that it asked for."""

    subject: str
    status: int
    """HTTP status; 0 when the connection broke."""
    right: bool
    seconds: float
    message: str
    retry_after: str | None = None


def draw(url: str, subject: str, image: np.ndarray, timeout: float = 240.0) -> Answer:
    """Ask for the subject's image."""
    body = json.dumps({"model": subject, "prompt": "a {subject} on the beach", "seed": SEED}).encode()
    request = urllib.request.Request(f"{url}/v1/images/generations", body, {"Content-Type": "application/json"})
    started = time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            [found] = json.load(response)["data"]
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        return Answer(
            subject, error.code, False, time.monotonic() - started, text, dict(error.headers).get("Retry-After")
        )
    except OSError as error:
        return Answer(subject, 0, False, time.monotonic() - started, repr(error))
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["b64_json"]))))
    return Answer(subject, 200, np.array_equal(drawn, image), time.monotonic() - started, "")


class Traffic:
    """Clients that ask for subjects at random, one after another, while the block runs.

    `patient` clients ask again, twice, after an answer that allows it, as the official client does by itself.
    """

    def __init__(
        self,
        url: str,
        images: dict[str, np.ndarray],
        weights: Sequence[float],
        clients: int = 4,
        requests: int | None = None,
        patient: bool = False,
    ) -> None:
        """Ask `requests` times, or until the block ends."""
        self.answers: list[Answer] = []
        self._url, self._images, self._weights, self._patient = url, images, weights, patient
        self._left = requests
        self._lock, self._over = threading.Lock(), threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(clients)]

    def _take(self) -> bool:
        with self._lock:
            if self._left is not None:
                self._left -= 1
            return not self._over.is_set() and (self._left is None or self._left >= 0)

    def _ask(self, number: int) -> None:
        chance = random.Random(number)
        while self._take():
            [subject] = chance.choices(list(self._images), self._weights)
            answer = draw(self._url, subject, self._images[subject])
            for wait in (0.5, 2.0) if self._patient else ():
                if answer.status in (0, 429) or answer.status >= 500:
                    time.sleep(wait)
                    answer = draw(self._url, subject, self._images[subject])
            with self._lock:
                self.answers.append(answer)

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def wait_for(self, more: int, seconds: float = 240.0) -> None:
        """Wait for so many more right answers, and fail when they do not come."""
        enough, end = self.right + more, time.monotonic() + seconds
        while self.right < enough:
            assert time.monotonic() < end, f"{self.right} of {enough} right answers; others: {self.others[-3:]}"
            time.sleep(0.05)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._left is None or kind is not None:
            self._over.set()
        for thread in self._threads:
            thread.join()

    @property
    def right(self) -> int:
        """How many answers were the image asked for."""
        return sum(answer.right for answer in self.answers)

    @property
    def wrong(self) -> list[Answer]:
        """Images that are not their subject's own: there may never be one."""
        return [answer for answer in self.answers if answer.status == 200 and not answer.right]

    @property
    def others(self) -> list[Answer]:
        """Answers that are no image."""
        return [answer for answer in self.answers if answer.status != 200]


def count_reads(metrics_url: str) -> dict[str, float]:
    """How often each tier was the nearest that had the subject, over all replicas, as Prometheus sees it."""
    time.sleep(12)  # metrics are exported every ten seconds
    counts = {"host": 0.0, "disk": 0.0, "store": 0.0}
    with urllib.request.urlopen(metrics_url, timeout=10) as response:
        for line in response.read().decode().splitlines():
            if line.startswith("ray_dreambooth_subject_reads_total"):
                counts[line.split('tier="')[1].split('"')[0]] += float(line.split()[-1])
    return counts
