"""Three replicas under load: every image is its subject's own, few loads suffice, and a killed replica fails nobody."""

from __future__ import annotations

import base64
import io
import json
import random
import socket
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from ray import serve

from dreambooth.backbones import open_backbone
from dreambooth.store import SubjectStore
from serve.app import GIB, Arguments, app
from tests.serve.published import publish

pytestmark = pytest.mark.slow

SUBJECTS = [f"subject{number}" for number in range(12)]
ZIPF = [1 / rank**0.8 for rank in range(1, len(SUBJECTS) + 1)]


@dataclass(frozen=True)
class Server:
    """Three replicas, each with room for four of the twelve subjects; and the image of each subject."""

    url: str
    expected: dict[str, np.ndarray]

    def draw(self, subject: str) -> np.ndarray:
        body = {"model": subject, "prompt": "a {subject} on the beach", "seed": 3}
        request = urllib.request.Request(
            f"{self.url}/v1/images/generations", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            [image] = json.load(response)["data"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(image["b64_json"]))))

    def load(self, requests: int, seed: int) -> list[str]:
        """The subjects of random requests whose image was not their own."""
        subjects = random.Random(seed).choices(SUBJECTS, ZIPF, k=requests)
        with ThreadPoolExecutor(6) as clients:
            images = list(clients.map(self.draw, subjects))
        return [
            subject
            for subject, image in zip(subjects, images, strict=True)
            if not np.array_equal(image, self.expected[subject])
        ]


@pytest.fixture(scope="module")
def server(small_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    store = SubjectStore(tmp_path_factory.mktemp("serving"))
    backbone = open_backbone(small_sdxl)
    store.add_backbone(backbone)
    expected = {}
    for number, subject in enumerate(SUBJECTS):
        published = publish(store, backbone, subject, f"{number + 1:012}", "unet")
        unet = UNet2DConditionModel.from_pretrained(store.local_version(published), subfolder="unet")
        pipeline = StableDiffusionXLPipeline.from_pretrained(small_sdxl, unet=unet, add_watermarker=False)
        pipeline.set_progress_bar_config(disable=True)
        expected[subject] = np.asarray(
            pipeline(
                f"a sks {subject} on the beach",
                generator=torch.Generator().manual_seed(3),
                num_inference_steps=3,
                guidance_scale=4.0,
                width=32,
                height=32,
            ).images[0]
        )
        size = sum(parameter.nbytes for parameter in unet.parameters())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init(num_cpus=4, log_to_driver=False, logging_level="ERROR")
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    room = 4.5 * size / GIB
    serve.run(app(Arguments(store=str(store.root), without_keys=True, replicas=3, host_memory=room)))
    yield Server(f"http://127.0.0.1:{port}", expected)
    serve.shutdown()
    ray.shutdown()


def reads() -> dict[str, float]:
    """How often each tier was the nearest that had the subject, over all replicas."""
    time.sleep(12)  # metrics are exported every ten seconds
    [node] = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    counts = {"host": 0.0, "store": 0.0}
    with urllib.request.urlopen(url, timeout=10) as response:
        for line in response.read().decode().splitlines():
            if line.startswith("ray_dreambooth_subject_reads_total"):
                counts[line.split('tier="')[1].split('"')[0]] += float(line.split()[-1])
    return counts


def test_images_are_their_subjects_own_and_few_loads_suffice(server: Server) -> None:
    assert len({image.tobytes() for image in server.expected.values()}) == len(SUBJECTS)
    assert server.load(120, seed=1) == []
    counts = reads()
    assert sum(counts.values()) == 120, counts
    assert counts["store"] <= 15, counts  # 12 are needed


def test_a_killed_replica_fails_no_request(server: Server) -> None:
    for trial in range(3):
        with ThreadPoolExecutor(1) as background:
            wrong = background.submit(server.load, 60, seed=2 + trial)
            time.sleep(1)
            names = [entry["name"] for entry in ray.util.list_named_actors(all_namespaces=True)]
            replicas = sorted(name for name in names if name.startswith("SERVE_REPLICA::default#subjects-"))
            ray.kill(ray.get_actor(replicas[0], namespace="serve"), no_restart=True)
            assert wrong.result(timeout=300) == []
