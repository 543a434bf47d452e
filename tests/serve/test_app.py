"""The application over HTTP: its images are those of plain diffusers, its errors OpenAI's."""

from __future__ import annotations

import base64
import io
import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from pydantic import ValidationError
from ray import serve
from transformers import CLIPTextModel

from dreambooth.store import SubjectStore
from serve.app import Arguments, app
from tests.serve.published import CHANGED, DOG, MUG, OLD_MUG, publish_all

KINDS = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}


@dataclass(frozen=True)
class Server:
    """The application, and the store that it serves."""

    url: str
    store: SubjectStore
    backbone: Path

    def ask(self, path: str, body: object = None, raw: bytes | None = None) -> tuple[int, Any]:
        """Status and parsed JSON of a GET, or of a POST of `body`."""
        data = raw if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def generate(self, **body: object) -> tuple[int, Any]:
        return self.ask("/v1/images/generations", {"prompt": "a {subject} on the beach", **body})

    def pixels(self, **body: object) -> list[np.ndarray]:
        status, answer = self.generate(**body)
        assert status == 200, answer
        pngs = [base64.b64decode(image["b64_json"]) for image in answer["data"]]
        return [np.asarray(Image.open(io.BytesIO(png))) for png in pngs]


@pytest.fixture(scope="module")
def server(local_ray: None, small_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    store = SubjectStore(tmp_path_factory.mktemp("serve"))
    publish_all(store, small_sdxl)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(app(Arguments(store=str(store.root), without_keys=True)))
    yield Server(f"http://127.0.0.1:{port}", store, small_sdxl)
    serve.shutdown()


@pytest.fixture(scope="module")
def plain(server: Server) -> Iterator[Callable[..., np.ndarray]]:
    """Draws an image with diffusers alone, from the files that were published."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def draw(subject: str, version: str, prompt: str, seed: int, **options: Any) -> np.ndarray:
        name = CHANGED[subject, version]
        folder = server.store.version_location(subject, version).local
        network = KINDS[name].from_pretrained(folder, subfolder=name)
        pipeline = StableDiffusionXLPipeline.from_pretrained(server.backbone, **{name: network}, add_watermarker=False)
        pipeline.set_progress_bar_config(disable=True)
        settings = {"num_inference_steps": 3, "guidance_scale": 4.0, "width": 32, "height": 32, **options}
        image = pipeline(prompt, generator=torch.Generator().manual_seed(seed), **settings).images[0]
        return np.asarray(image)

    yield draw
    torch.set_num_threads(threads)


def test_images_are_those_of_plain_diffusers(server: Server, plain: Callable[..., np.ndarray]) -> None:
    [drawn] = server.pixels(model="mug", seed=7)
    assert np.array_equal(drawn, plain(*MUG, "a sks mug on the beach", 7))
    [drawn] = server.pixels(
        model="@".join(OLD_MUG),
        prompt="two cups",
        negative_prompt="blurry",
        size="64x32",
        seed=2**32 - 1,
        num_inference_steps=2,
        guidance_scale=7,
    )
    options = {"negative_prompt": "blurry", "width": 64, "num_inference_steps": 2, "guidance_scale": 7.0}
    assert np.array_equal(drawn, plain(*OLD_MUG, "two cups", 2**32 - 1, **options))


def test_alternating_subjects_never_mix(server: Server, plain: Callable[..., np.ndarray]) -> None:
    expected = {key: plain(*key, f"a sks {key[0]} on the beach", 3) for key in CHANGED}
    assert len({image.tobytes() for image in expected.values()}) == len(CHANGED)
    for subject, version in [*CHANGED, *reversed(CHANGED), *CHANGED]:
        [drawn] = server.pixels(model=f"{subject}@{version}", seed=3)
        assert np.array_equal(drawn, expected[subject, version])


def test_each_image_can_be_asked_for_again(server: Server) -> None:
    status, answer = server.generate(model="dog", n=3)
    assert (status, answer["model"], answer["version"]) == (200, "@".join(DOG), DOG[1])
    assert (answer["size"], answer["warning"]) == ("32x32", None)
    for image in answer["data"]:
        assert image["revised_prompt"] == "a sks dog on the beach"
        _, again = server.generate(model=answer["model"], seed=image["seed"])
        assert again["data"] == [image]
    assert len({image["b64_json"] for image in answer["data"]}) == 3


def test_a_prompt_without_the_subject_is_served_with_a_warning(server: Server) -> None:
    status, answer = server.generate(model="dog", prompt="a tree")
    assert (status, answer["data"][0]["revised_prompt"]) == (200, "a tree")
    assert "{subject}" in answer["warning"]


def test_models_are_listed_with_their_lineage(server: Server) -> None:
    status, answer = server.ask("/v1/models")
    assert (status, answer["object"]) == (200, "list")
    versions = [f"{subject}@{version}" for subject, version in CHANGED]
    assert sorted(model["id"] for model in answer["data"]) == sorted(["mug", "dog", *versions])
    for model in answer["data"]:
        status, details = server.ask(f"/v1/models/{model['id']}")
        assert status == 200
        lineage = details.pop("lineage")
        assert details == model
        assert lineage == server.store.version(lineage["subject"], model["version"]).manifest


def test_a_version_published_later_is_served(server: Server, tmp_path: Path) -> None:
    published = server.store.version(*DOG)
    assert published is not None
    assert server.generate(model="late")[0] == 404
    lineage = {key: published.manifest[key] for key in ("class_noun", "identifier", "backbone", "run")}
    server.store.publish("late", "4" * 12, server.store.local_version(published), lineage, published.components)
    for _ in range(100):
        status, _ = server.generate(model="late")
        if status == 200:
            return
        time.sleep(0.1)
    pytest.fail("the new version is not served")


@pytest.mark.parametrize("model", ["cat", "mug@" + "9" * 12, "mug@", "", "@", "../mug", "mug@../1"])
def test_unknown_models_are_not_found(server: Server, model: str) -> None:
    status, answer = server.generate(model=model)
    assert status == 404
    assert answer["error"] == {
        "message": f"the model {model!r} does not exist",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"prompt": "a {cat}"}, "'{cat}'"),
        ({"prompt": "tree " * 100}, "tokens"),
        ({"negative_prompt": "tree " * 100}, "tokens"),
        ({"size": "32x33"}, "multiple of"),
        ({"size": "96x32"}, "at most 64"),
    ],
)
def test_what_the_model_cannot_draw_is_a_bad_request(server: Server, body: dict[str, Any], reason: str) -> None:
    status, answer = server.generate(model="mug", **body)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert reason in answer["error"]["message"]
    assert "Traceback" not in answer["error"]["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("model", None), ("prompt", ""), ("prompt", "a" * 4001), ("prompt", "\ud800"), ("n", 0), ("n", 11)],
        *[("n", "1"), ("n", True), ("size", "big"), ("response_format", "url"), ("seed", -1), ("seed", 2**32)],
        *[("num_inference_steps", 0), ("num_inference_steps", 201), ("guidance_scale", -1), ("negative_prompt", 1)],
        *[("guidance_scale", float("nan")), ("guidance_scale", 51), ("guidence_scale", 5)],
    ],
)
def test_invalid_fields_are_named(server: Server, field: str, value: object) -> None:
    status, answer = server.generate(**{"model": "mug", field: value})
    assert (status, answer["error"]["type"], answer["error"]["param"]) == (422, "invalid_request_error", field)


def test_other_errors_have_the_same_shape(server: Server) -> None:
    for path, raw, expected in [
        ("/v1/images/generations", b"{", 400),
        ("/v1/images/generations", b"[]", 422),
        ("/v1/images/generations", None, 405),
        ("/v1/images", None, 404),
        ("/v1/models/cat", None, 404),
    ]:
        status, answer = server.ask(path, raw=raw)
        assert status == expected
        assert answer["error"].keys() == {"message", "type", "param", "code"}


def test_the_application_refuses_what_it_cannot_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no published version"):
        app(Arguments(store=str(tmp_path), without_keys=True))
    with pytest.raises(ValidationError, match="replica"):
        Arguments.model_validate({"store": str(tmp_path), "replica": "2"})
