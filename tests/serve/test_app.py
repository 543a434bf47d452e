"""The application over HTTP: its images are those of plain diffusers, its errors in OpenAI's form."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
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
import ray
import torch
import yaml
from click import ClickException
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from openai import AuthenticationError, BadRequestError, NotFoundError, OpenAI
from PIL import Image
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import ServeDeploySchema
from transformers import CLIPTextModel

from dreambooth.store import SubjectStore
from serve.api.auth import KeyFolder
from serve.app import app, deployment_options
from serve.config import ServeConfig
from tests.conftest import ROOT
from tests.serve.published import CHANGED, DOG, MUG, OLD_MUG, publish_all

KINDS = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}


@dataclass(frozen=True)
class Server:
    """The application, and the store that it serves."""

    url: str
    store: SubjectStore
    backbone: Path
    key: str
    """Sees every subject, and is an admin's."""
    dog_key: str
    """Sees the dog alone, in images of at most 32 pixels, 20 a minute."""

    def ask(
        self,
        path: str,
        body: object = None,
        raw: bytes | None = None,
        key: str | None = None,
        method: str | None = None,
    ) -> tuple[int, Any]:
        """Status and parsed JSON of a GET, or of a POST of `body`."""
        data = raw if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key if key is None else key}"}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.loads(response.read() or "null")
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def client(self, key: str | None = None) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.key if key is None else key, max_retries=0)

    def generate(self, key: str | None = None, **body: object) -> tuple[int, Any]:
        return self.ask("/v1/images/generations", {"prompt": "a {subject} on the beach", **body}, key=key)

    def pixels(self, **body: object) -> list[np.ndarray]:
        status, answer = self.generate(**body)
        assert status == 200, answer
        pngs = [base64.b64decode(image["b64_json"]) for image in answer["data"]]
        return [np.asarray(Image.open(io.BytesIO(png))) for png in pngs]


def wait_until(condition: Callable[[], Any], seconds: float = 20) -> Any:
    """What the condition gives once it gives something true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.1)
    pytest.fail("it did not come")


@pytest.fixture(scope="module")
def server(local_ray: None, small_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    store = SubjectStore(tmp_path_factory.mktemp("serve"))
    publish_all(store, small_sdxl)
    keys = KeyFolder(store.root / "keys")
    key, _ = keys.make("us", (), admin=True)
    dog_key, _ = keys.make("kennel", ("dog",), images_per_minute=20, largest_side=32)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(app(ServeConfig(store=str(store.root), queue=4, keep=("mug",))))
    yield Server(f"http://127.0.0.1:{port}", store, small_sdxl, key, dog_key)
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


def test_models_are_listed_with_their_lineage_and_scores(server: Server) -> None:
    record = {"version": MUG[1], "scores": {"DINO": 0.7}}
    (server.store.scores_location(*MUG) / "0123.json").write_json(record)
    status, answer = server.ask("/v1/models")
    assert (status, answer["object"]) == (200, "list")
    versions = [f"{subject}@{version}" for subject, version in CHANGED]
    assert sorted(model["id"] for model in answer["data"]) == sorted(["mug", "dog", *versions])
    for model in answer["data"]:
        status, details = server.ask(f"/v1/models/{model['id']}")
        assert status == 200
        lineage, scores = details.pop("lineage"), details.pop("scores")
        assert details == model
        assert scores == ([record] if model["version"] == MUG[1] else [])
        assert lineage == server.store.version(lineage["subject"], model["version"]).manifest


def test_a_version_published_later_is_served(server: Server, tmp_path: Path) -> None:
    published = server.store.version(*DOG)
    assert published is not None
    assert server.generate(model="late")[0] == 404
    lineage = {key: published.manifest[key] for key in ("class_noun", "identifier", "phrase", "backbone", "run")}
    server.store.publish("late", "4" * 12, server.store.local_version(published), lineage, published.components)
    wait_until(lambda: server.generate(model="late")[0] == 200)


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
        *[("n", "1"), ("n", True), ("size", "big"), ("response_format", "uri"), ("seed", -1), ("seed", 2**32)],
        *[("num_inference_steps", 0), ("num_inference_steps", 201), ("guidance_scale", -1), ("negative_prompt", 1)],
        *[("guidance_scale", float("nan")), ("guidance_scale", 51), ("guidence_scale", 5)],
    ],
)
def test_invalid_fields_are_named(server: Server, field: str, value: object) -> None:
    status, answer = server.generate(**{"model": "mug", field: value})
    assert (status, answer["error"]["type"], answer["error"]["param"]) == (422, "invalid_request_error", field)


def test_the_official_client_works_unchanged(server: Server) -> None:
    client = server.client()
    answer = client.images.generate(
        model="mug", prompt="a {subject}", n=2, size="32x32", response_format="b64_json", extra_body={"seed": 3}
    )
    assert answer.data is not None
    again = server.generate(model="mug", prompt="a {subject}", seed=3)[1]["data"][0]
    assert answer.data[0].b64_json == again["b64_json"]
    assert {"mug", "dog"} <= {model.id for model in client.models.list()}
    assert client.models.retrieve("@".join(MUG)).id == "@".join(MUG)
    with pytest.raises(NotFoundError, match="does not exist"):
        client.images.generate(model="cat", prompt="a {subject}")
    with pytest.raises(BadRequestError, match="multiple of"):
        client.images.generate(model="mug", prompt="a {subject}", size="33x33")  # type: ignore[call-overload]
    with pytest.raises(AuthenticationError):
        server.client("wrong").models.list()


def test_the_official_client_gets_urls(server: Server) -> None:
    answer = server.client().images.generate(
        model="mug", prompt="a {subject}", n=2, response_format="url", extra_body={"seed": 3}
    )
    assert answer.data is not None
    same = server.generate(model="mug", prompt="a {subject}", n=2, seed=3)[1]["data"]
    for image, other in zip(answer.data, same, strict=True):
        assert image.url is not None
        with urllib.request.urlopen(image.url, timeout=20) as response:  # without a key
            assert response.read() == base64.b64decode(other["b64_json"])
    assert server.ask("/v1/images/files/" + "0" * 30)[0] == 404


def test_the_official_client_streams_unfinished_images(server: Server) -> None:
    events = list(
        server.client().images.generate(
            model="mug",
            prompt="a {subject}",
            stream=True,
            partial_images=2,
            extra_body={"seed": 3, "num_inference_steps": 9},
        )
    )
    assert [event.type for event in events] == [
        *["image_generation.partial_image"] * 2,
        "image_generation.completed",
    ]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]  # type: ignore[union-attr]
    [image] = server.generate(model="mug", prompt="a {subject}", seed=3, num_inference_steps=9)[1]["data"]
    assert events[2].b64_json == image["b64_json"]
    assert len({event.b64_json for event in events}) == 3


def test_a_stream_that_is_not_allowed_is_an_error_with_its_status(server: Server) -> None:
    assert server.generate(model="mug", stream=True, size="32x33")[0] == 400
    assert server.generate(model="mug", partial_images=1)[0] == 400


def test_a_key_sees_its_tenants_subjects_alone(server: Server) -> None:
    _, answer = server.ask("/v1/models", key=server.dog_key)
    assert sorted(model["id"] for model in answer["data"]) == ["dog", "@".join(DOG)]
    assert server.generate(server.dog_key, model="dog")[0] == 200
    foreign = [server.generate(server.dog_key, model=model) for model in ("mug", "@".join(MUG))]
    unknown = [server.generate(server.dog_key, model=model) for model in ("cup", "cup@" + MUG[1])]
    for (status, theirs), (other, nobodys) in zip(foreign, unknown, strict=True):
        assert status == other == 404
        theirs["error"].pop("message"), nobodys["error"].pop("message")
        assert theirs == nobodys
    assert server.ask("/v1/models/mug", key=server.dog_key)[0] == 404


def test_a_request_without_a_valid_key_is_refused(server: Server) -> None:
    for key in ("", "wrong", "\xff", server.key[:-1]):
        status, answer = server.generate(key, model="dog")
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")


def test_the_limits_of_a_key_hold(server: Server) -> None:
    status, answer = server.generate(server.dog_key, model="dog", size="64x32")
    assert (status, answer["error"]["param"]) == (400, "size")
    answers = [server.generate(server.dog_key, model="dog", n=9, num_inference_steps=1) for _ in range(3)]
    assert {status for status, _ in answers} == {200, 429}
    assert answers[-1][1]["error"]["code"] == "rate_limit_exceeded"
    assert server.generate(model="dog")[0] == 200  # other keys are not slowed


def test_an_admin_key_lists_and_revokes_keys(server: Server) -> None:
    secret, key = KeyFolder(server.store.root / "keys").make("guest", ("dog",))
    wait_until(lambda: server.ask("/v1/models", key=secret)[0] == 200)
    assert server.ask("/v1/admin/keys", key=secret)[0] == 403
    status, answer = server.ask("/v1/admin/keys")
    assert (status, {"us", "kennel", "guest"} <= {entry["tenant"] for entry in answer["data"]}) == (200, True)
    assert secret not in json.dumps(answer)
    assert server.ask(f"/v1/admin/keys/{key.id}", key=secret, method="DELETE")[0] == 403
    assert server.ask(f"/v1/admin/keys/{key.id}", method="DELETE")[0] == 204
    assert server.ask(f"/v1/admin/keys/{key.id}", method="DELETE")[0] == 404
    wait_until(lambda: server.ask("/v1/models", key=secret)[0] == 401)


def test_a_full_queue_refuses_and_clients_that_disconnect_leave_it(server: Server) -> None:
    body = json.dumps({"model": "mug", "prompt": "a", "n": 10, "num_inference_steps": 200}).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    address = server.url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as clients:
        for _ in range(60):
            client = clients.enter_context(socket.create_connection((address[0], int(address[1]))))
            client.sendall(head.encode() + body)
            time.sleep(0.03)  # the queue is short: let it pass on what came before
        status, answer = wait_until(
            lambda: refused if (refused := server.generate(model="dog", deadline=1))[0] == 429 else None
        )
    assert (status, answer["error"]["code"], answer["error"]["type"]) == (429, "overloaded", "rate_limit_error")
    started = time.monotonic()
    wait_until(lambda: server.generate(model="dog", deadline=5)[0] == 200)
    assert time.monotonic() - started < 20  # the work that was asked for would have taken minutes


def test_a_deadline_is_kept(server: Server) -> None:
    started = time.monotonic()
    status, answer = server.generate(model="mug", n=10, num_inference_steps=200, deadline=1)
    assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
    assert time.monotonic() - started < 5


def test_an_oversized_body_is_refused(server: Server) -> None:
    status, answer = server.ask("/v1/images/generations", raw=b"[" * 100_000)
    assert (status, answer["error"]["type"]) == (413, "invalid_request_error")


def test_metrics_are_exported_without_a_label_that_grows(server: Server) -> None:
    server.generate(model="mug")
    server.generate(model="dog")
    [node] = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def scrape() -> list[str]:
        with urllib.request.urlopen(url, timeout=10) as response:
            return [line for line in response.read().decode().splitlines() if line.startswith("ray_dreambooth_")]

    def deployed(name: str, lines: list[str]) -> list[str]:
        # Other tests of this process may have left measures without a deployment.
        return [line for line in lines if line.startswith(f"{name}{{") and 'deployment="' in line]

    names = set(re.findall(r"ray_dreambooth_\w+", (ROOT / "cluster" / "grafana_serving.json").read_text()))
    wait_until(lambda: all(deployed(name, scrape()) for name in names), 60)
    lines = scrape()
    for stage in ("load", "wait", "swap", "sample", "encode", "answer"):
        assert any(f'stage="{stage}"' in line for line in lines), stage
    assert not [line for line in lines if "mug" in line or "dog" in line]
    for name in names:
        assert all('replica="' in line for line in deployed(name, lines)), name


def test_requests_are_logged_with_their_id_and_without_prompts(server: Server) -> None:
    secret = "a word that nobody else would write"
    request = urllib.request.Request(
        f"{server.url}/v1/images/generations",
        json.dumps({"model": "mug", "prompt": secret}).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {server.key}", "X-Request-ID": "our-request"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.headers["x-request-id"] == "our-request"
    folder = Path(ray._private.worker.global_worker.node.get_session_dir_path()) / "logs" / "serve"

    def lines() -> list[dict[str, Any]]:
        text = "".join(path.read_text() for path in folder.glob("*.log"))
        assert secret not in text
        return [json.loads(line) for line in text.splitlines() if "our-request" in line and line.startswith("{")]

    wait_until(lambda: [line for line in lines() if line.get("status") == 200 and line.get("tenant") == "us"])


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
    with pytest.raises(ValueError, match="there are no keys"):
        app(ServeConfig(store=str(tmp_path)))
    with pytest.raises(ValueError, match="no published version"):
        app(ServeConfig(store=str(tmp_path), without_keys=True))
    with pytest.raises(ClickException, match="unknown argument replica: the nearest valid one is replicas"):
        app({"store": str(tmp_path), "replica": "2"})


def test_without_keys_the_application_refuses_to_listen_beyond_this_machine(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ServeConfig(store=str(server.store.root), without_keys=True)
    assert app(args)
    monkeypatch.setattr(HTTPOptions.model_fields["host"], "default", "0.0.0.0")
    HTTPOptions.model_rebuild(force=True)
    with pytest.raises(ValueError, match=r"listen on 0\.0\.0\.0"):
        app(args)
    monkeypatch.undo()
    HTTPOptions.model_rebuild(force=True)


def test_replicas_can_follow_the_load_down_to_none() -> None:
    options = deployment_options(ServeConfig.model_validate({"store": "s", "replicas": "0", "max_replicas": "4"}))
    scaling = options["autoscaling_config"]
    assert (scaling.min_replicas, scaling.max_replicas, "num_replicas" in options) == (0, 4, False)
    assert deployment_options(ServeConfig(store="s", replicas=2))["num_replicas"] == 2


def test_the_configuration_for_clusters_is_one_that_serve_takes() -> None:
    document = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    [application] = ServeDeploySchema(**document).applications
    args = ServeConfig(**application.args)
    assert (application.import_path, args.replicas, args.max_replicas) == ("serve.app:app", 1, 4)
    assert deployment_options(args)["ray_actor_options"] == {"num_cpus": 4, "num_gpus": 1}
