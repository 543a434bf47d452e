"""The HTTP API, in the shapes of OpenAI's images API; knows nothing of Ray.

Without authentication: it answers clients on this machine only. No deadlines, rate limits or streaming yet.
"""

from __future__ import annotations

import base64
import ipaddress
import secrets
import time
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat
from starlette.exceptions import HTTPException

from dreambooth.prompts import PLACEHOLDER, fill
from dreambooth.sampling import SamplerSettings
from dreambooth.store import Version
from serve.catalog import Catalog
from serve.order import BadRequest, Drawn, Order

_SEEDS = 2**32  # torch's CPU generator keeps the low 32 bits of a seed

Draw = Callable[[str, Order], AsyncIterator[Drawn]]
"""Draws an order on a backbone, named by its hash."""


class ImagesRequest(BaseModel):
    """Body of `POST /v1/images/generations`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(max_length=200, description="A subject, for its newest version, or `subject@version`.")
    prompt: str = Field(
        min_length=1, max_length=4000, description="`{subject}` in it stands for the identifier and class noun."
    )
    n: int = Field(1, ge=1, le=10, description="Number of images.")
    size: str | None = Field(
        None, pattern=r"^[1-9]\d{1,4}x[1-9]\d{1,4}$", description="`WIDTHxHEIGHT`; by default as the model was trained."
    )
    response_format: Literal["b64_json"] = "b64_json"
    seed: int | None = Field(
        None, ge=0, lt=_SEEDS, description="Seed of the first image, each next one's is 1 higher; by default random."
    )
    num_inference_steps: int | None = Field(None, ge=1, le=200, description="By default as the model's samples.")
    guidance_scale: Annotated[FiniteFloat, Field(ge=0, le=50)] | None = Field(
        None, description="By default as the model's samples."
    )
    negative_prompt: str | None = Field(None, max_length=4000)


class GeneratedImage(BaseModel):
    """One image; asked for again with its seed and version it comes out the same."""

    b64_json: str = Field(description="A PNG file in base64.")
    revised_prompt: str = Field(description="The prompt as the model saw it.")
    seed: int
    batch: int = Field(description="How many images were drawn together; other numbers may round differently.")


class ImagesResponse(BaseModel):
    """Answer to `POST /v1/images/generations`."""

    created: int = Field(description="Unix time.")
    model: str = Field(description="The version that drew the images, as `subject@version`.")
    version: str
    size: str
    data: list[GeneratedImage]
    warning: str | None = None


class Model(BaseModel):
    """A subject, or one version of it."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Unix time of publication.")
    owned_by: str = "dreambooth"
    version: str = Field(description="For a subject, its newest.")


class ModelList(BaseModel):
    """Answer to `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


class ModelDetails(Model):
    """Answer to `GET /v1/models/{model}`."""

    lineage: dict[str, Any] = Field(description="The version's manifest: backbone, images, settings, files.")


class Error(BaseModel):
    """What went wrong; `param` names the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every answer that is not a success."""

    error: Error


class ApiError(HTTPException):
    """An error to be answered in OpenAI's shape."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        """Name the HTTP status, and what OpenAI's error object says beside the message."""
        super().__init__(status, message)
        self.param, self.code = param, code


def create_api(catalog: Catalog, draw: Draw) -> FastAPI:
    """The application: `catalog` knows the models, `draw` makes the images."""
    api = FastAPI(
        title="DreamBooth",
        dependencies=[Depends(_only_this_machine)],
        responses={status: {"model": ErrorResponse} for status in (400, 403, 404, 422, 500)},
    )
    api.add_exception_handler(HTTPException, _answer_http_error)
    api.add_exception_handler(RequestValidationError, _answer_invalid_request)
    api.add_exception_handler(Exception, _answer_failure)

    async def find(model: str) -> Version:
        version = await catalog.find(model)
        if version is None:
            raise ApiError(404, f"the model {model!r} does not exist", "model", "model_not_found")
        return version

    @api.post("/v1/images/generations")
    async def generate_images(body: ImagesRequest) -> ImagesResponse:
        """Draw images of a subject."""
        version = await find(body.model)
        seed = secrets.randbelow(_SEEDS) if body.seed is None else body.seed
        try:
            order = make_order(body, version, seed)
            drawn = [image async for image in draw(version.manifest["backbone"]["hash"], order)]
        except BadRequest as error:
            raise ApiError(400, str(error)) from error
        named = version.manifest["identifier"] in order.prompt
        return ImagesResponse(
            created=int(time.time()),
            model=f"{version.subject}@{version.id}",
            version=version.id,
            size=f"{order.width}x{order.height}",
            data=[
                GeneratedImage(
                    b64_json=base64.b64encode(image.png).decode(),
                    revised_prompt=order.prompt,
                    seed=order.seeds[image.number],
                    batch=image.batch,
                )
                for image in sorted(drawn, key=lambda image: image.number)
            ],
            warning=None if named else f"the prompt does not name the subject: write {PLACEHOLDER} where it belongs",
        )

    @api.get("/v1/models")
    async def list_models() -> ModelList:
        """List every subject, and every version of it."""
        models = []
        for subject, published in (await catalog.versions()).items():
            models.append(describe(subject, published[-1]))
            models += [describe(f"{subject}@{version.id}", version) for version in published]
        return ModelList(data=models)

    @api.get("/v1/models/{model}")
    async def retrieve_model(model: str) -> ModelDetails:
        """Tell where a subject's newest version, or the version named, comes from."""
        version = await find(model)
        return ModelDetails(**describe(model, version).model_dump(), lineage=version.manifest)

    return api


def make_order(body: ImagesRequest, version: Version, seed: int) -> Order:
    """The order for a request: what it leaves open is as in the samples that the version was published with."""
    samples = SamplerSettings(**version.manifest["run"]["samples"])
    width, height = map(int, body.size.split("x")) if body.size else (samples.resolution, samples.resolution)
    try:
        prompt = fill(body.prompt, version.manifest["identifier"], version.manifest["class_noun"])
    except ValueError as error:
        raise BadRequest(str(error)) from error
    return Order(
        subject=version.subject,
        version=version.id,
        prompt=prompt,
        negative_prompt=body.negative_prompt,
        width=width,
        height=height,
        steps=samples.steps if body.num_inference_steps is None else body.num_inference_steps,
        guidance=samples.guidance if body.guidance_scale is None else body.guidance_scale,
        seeds=tuple((seed + number) % _SEEDS for number in range(body.n)),
    )


def describe(model: str, version: Version) -> Model:
    """A version as an entry of the list of models, under the id `model`."""
    return Model(id=model, created=int(datetime.fromisoformat(version.created).timestamp()), version=version.id)


def is_loopback(host: str) -> bool:
    """Whether an IP address or `localhost` is reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _only_this_machine(request: Request) -> None:
    if request.client is None or not is_loopback(request.client.host):
        raise ApiError(403, "this server has no keys, so it answers clients on its own machine only")


def _answer(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    body = ErrorResponse(error=Error(message=message, type=kind, param=param, code=code))
    return JSONResponse(body.model_dump(), status)


async def _answer_http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _answer(error.status_code, error.detail, getattr(error, "param", None), getattr(error, "code", None))


async def _answer_invalid_request(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return _answer(400, "the body is not valid JSON")
    param = ".".join(str(part) for part in first["loc"][1:])
    if not param:
        return _answer(422, "the body must be a JSON object, sent with Content-Type: application/json")
    return _answer(422, f"{param}: {first['msg']}", param, first["type"])


async def _answer_failure(_request: Request, _error: Exception) -> JSONResponse:
    return _answer(500, "the server failed to answer; its log says why")
