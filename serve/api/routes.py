"""The HTTP API, in the form of OpenAI's images API, without Ray. Docstrings of its routes are part of its document."""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from dreambooth.subjects.prompts import PLACEHOLDER, fill
from serve.api import errors
from serve.api.auth import Admin, Holder, Key, KeyFolder, KeyRing, admit, check_reach
from serve.api.errors import ApiError
from serve.api.image_files import ImageFiles
from serve.api.middleware import BoundedBody, Record
from serve.api.protocol import (
    EVENT_STREAM,
    SEEDS,
    CompletedEvent,
    ErrorResponse,
    GeneratedImage,
    ImagesRequest,
    ImagesResponse,
    KeyEntry,
    KeyList,
    Model,
    ModelDetails,
    ModelList,
    PartialImageEvent,
)
from serve.catalog.catalog import Catalog, Entry
from serve.request import BadRequest, DrawnImage, GenerationRequest

_GENERATIONS = "/v1/images/generations"
_FILES = "/v1/images/files"
_ERRORS = (400, 401, 403, 404, 408, 413, 422, 429, 500, 503, 504)
_BODY_BYTES = 2**16
_BODY_SECONDS = 30.0

Draw = Callable[[str, GenerationRequest], AsyncIterator[DrawnImage]]
"""Draws a request on the backbone with this hash."""


@dataclass(frozen=True)
class ApiConfig:
    """Settings of the API."""

    keys: KeyFolder | None
    """The keys; when None, every client on this machine is served, and no other."""
    files: ImageFiles
    """The images that are requested by URL."""
    public_url: str | None = None
    """What their URLs start with; by default the address that the request was sent to."""
    deadline: float = 300.0
    """Seconds that a request may take."""
    log_prompts: bool = False


def create_api(catalog: Catalog, draw: Draw, config: ApiConfig) -> FastAPI:
    """Build the application: `catalog` finds models, `draw` draws images."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        clearing = asyncio.create_task(config.files.keep_clear())
        yield
        clearing.cancel()

    api = FastAPI(
        title="DreamBooth",
        lifespan=lifespan,
        responses={status: {"model": ErrorResponse} for status in _ERRORS},
    )
    ring = KeyRing(config.keys.folder) if config.keys else None
    api.state.ring = ring
    errors.add_handlers(api)
    api.add_middleware(BoundedBody, most_bytes=_BODY_BYTES, seconds=_BODY_SECONDS)
    api.add_middleware(Record, path=_GENERATIONS)

    async def find(model: str, key: Key) -> Entry:
        entry = await catalog.find(model)
        if entry is None or not key.sees(entry.subject):
            raise ApiError(404, f"the model {model!r} does not exist", "model", "model_not_found")
        return entry

    @api.post(
        _GENERATIONS,
        response_model=ImagesResponse,
        responses={200: {"content": {"text/event-stream": EVENT_STREAM}}},
    )
    async def generate_images(request: Request, body: ImagesRequest, key: Holder) -> ImagesResponse | Response:
        """Draw images of a subject."""
        started = time.monotonic()
        request.state.record.update(model=body.model, n=body.n, tenant=key.tenant, key=key.id)
        if config.log_prompts:
            request.state.record.update(prompt=body.prompt, negative_prompt=body.negative_prompt)
        entry = await find(body.model, key)
        generation = make_request(body, entry)
        admit(generation, key, ring)
        seconds = min(body.deadline or config.deadline, config.deadline)
        images = until(started + seconds, seconds, draw(entry.backbone, generation))
        named = entry.identifier in generation.prompt
        warning = None if named else f"the prompt does not name the subject: write {PLACEHOLDER} where it belongs"
        if body.stream:
            first = await anext(images)  # an error before the first image is answered with its own status
            return StreamingResponse(events(generation, first, images, warning), media_type="text/event-stream")
        drawn = sorted([image async for image in images], key=lambda image: image.number)
        if body.response_format == "url":
            base = (config.public_url or str(request.base_url)).rstrip("/")
            names = await asyncio.gather(*(asyncio.to_thread(config.files.add, image.png) for image in drawn))
            places = [{"url": f"{base}{_FILES}/{name}"} for name in names]
        else:
            places = [{"b64_json": base64.b64encode(image.png).decode()} for image in drawn]
        return ImagesResponse(
            created=int(time.time()),
            model=generation.model,
            version=entry.version,
            size=f"{generation.width}x{generation.height}",
            data=[
                GeneratedImage(
                    **place, revised_prompt=generation.prompt, seed=generation.seeds[image.number], batch=image.batch
                )
                for place, image in zip(places, drawn, strict=True)
            ],
            seconds=round(time.monotonic() - started, 4),
            warning=warning,
        )

    @api.get(
        f"{_FILES}/{{name}}",
        dependencies=[Depends(check_reach)],
        response_class=Response,
        responses={200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}}},
    )
    async def fetch_image(name: str) -> Response:
        """Fetch an image that was asked for with `response_format: url`: its name is all the right that it takes."""
        expires = config.files.expires(name)
        image = await asyncio.to_thread(config.files.read, name)
        if expires is None or image is None:
            raise ApiError(404, "there is no such image, or no longer", "name", "image_not_found")
        headers = {"Cache-Control": f"private, max-age={max(0, expires - int(time.time()))}, immutable"}
        return Response(image, media_type="image/png", headers=headers)

    @api.get("/v1/models")
    async def list_models(key: Holder) -> ModelList:
        """List every subject that the key sees, and every version of it."""
        models = []
        for subject, published in (await catalog.versions()).items():
            if key.sees(subject):
                models.append(describe(subject, published[-1]))
                models += [describe(f"{subject}@{entry.version}", entry) for entry in published]
        return ModelList(data=models)

    @api.get("/v1/models/{model}")
    async def retrieve_model(model: str, key: Holder) -> ModelDetails:
        """Tell where a subject's newest version, or the version named, comes from, and how it was scored."""
        entry = await find(model, key)
        lineage, scores = await catalog.manifest(entry), await catalog.scores(entry)
        return ModelDetails(**describe(model, entry).model_dump(), lineage=lineage, scores=scores)

    if config.keys is not None:
        _add_key_routes(api, config.keys)
    return api


def _add_key_routes(api: FastAPI, keys: KeyFolder) -> None:
    @api.get("/v1/admin/keys")
    def list_keys(_: Admin) -> KeyList:
        """List the keys that are not revoked."""
        return KeyList(data=[KeyEntry(**{**asdict(key), "subjects": list(key.subjects)}) for key in keys.all()])

    @api.delete("/v1/admin/keys/{key_id}", status_code=204)
    def revoke_key(key_id: str, _: Admin) -> None:
        """Revoke a key; it is refused some seconds later."""
        try:
            keys.revoke(key_id)
        except ValueError:
            raise ApiError(404, f"the key {key_id!r} does not exist", "key_id") from None


# -- what is asked and answered ----------------------------------------------------------------------------------------


def make_request(body: ImagesRequest, entry: Entry) -> GenerationRequest:
    """The request to the replica; fields that the body leaves out are those of the samples of the version."""
    if entry.unserved is not None:
        message = f"{entry.subject}@{entry.version} cannot be drawn: {entry.unserved}"
        raise ApiError(400, message, "model", "model_not_served")
    samples = entry.samples
    width, height = map(int, body.size.split("x")) if body.size else (samples.resolution, samples.resolution)
    seed = secrets.randbelow(SEEDS) if body.seed is None else body.seed
    try:
        prompt = fill(body.prompt, entry.phrase)
    except ValueError as error:
        raise ApiError(400, f"prompt: {error}", "prompt") from error
    if body.stream and body.response_format == "url":
        raise ApiError(400, "response_format: a stream holds its images, as b64_json", "response_format")
    if body.partial_images and not body.stream:
        raise ApiError(400, "partial_images: unfinished images are sent only with stream", "partial_images")
    return GenerationRequest(
        subject=entry.subject,
        version=entry.version,
        prompt=prompt,
        negative_prompt=body.negative_prompt,
        width=width,
        height=height,
        steps=samples.steps if body.num_inference_steps is None else body.num_inference_steps,
        guidance=samples.guidance if body.guidance_scale is None else body.guidance_scale,
        seeds=tuple((seed + number) % SEEDS for number in range(body.n)),
        previews=body.partial_images,
    )


async def until(time_limit: float, seconds: float, images: AsyncIterator[DrawnImage]) -> AsyncIterator[DrawnImage]:
    """The images as they come; ApiError 504 at `time_limit` on the monotonic clock."""
    async with aclosing(images):  # type: ignore[type-var]
        while True:
            try:
                image = await asyncio.wait_for(anext(images), time_limit - time.monotonic())
            except StopAsyncIteration:
                return
            except TimeoutError:
                message = f"the images were not ready within {seconds:g} s"
                raise ApiError(504, message, code="deadline_exceeded") from None
            except BadRequest as error:
                raise ApiError(400, str(error)) from error
            yield image


async def events(
    request: GenerationRequest, first: DrawnImage, others: AsyncIterator[DrawnImage], warning: str | None
) -> AsyncIterator[str]:
    """The images as server-sent events."""
    async with aclosing(others):  # type: ignore[type-var]
        yield _event(request, first, warning)
        try:
            async for image in others:
                yield _event(request, image, warning)
        except Exception as error:
            body = errors.as_body(errors.as_http_error(error))
            yield f"event: error\ndata: {body.model_dump_json()}\n\n"
            if not isinstance(error, ApiError):
                raise


def _event(request: GenerationRequest, image: DrawnImage, warning: str | None) -> str:
    common: dict[str, Any] = {
        "b64_json": base64.b64encode(image.png).decode(),
        "created_at": int(time.time()),
        "size": f"{request.width}x{request.height}",
        "seed": request.seeds[image.number],
        "model": request.model,
    }
    event: CompletedEvent | PartialImageEvent
    if image.preview is None:
        event = CompletedEvent(**common, revised_prompt=request.prompt, batch=image.batch, warning=warning)
    else:
        event = PartialImageEvent(**common, partial_image_index=image.preview)
    return f"event: {event.type}\ndata: {event.model_dump_json()}\n\n"


def describe(model: str, entry: Entry) -> Model:
    """A version as an entry of the list of models, under the id `model`."""
    created = int(datetime.fromisoformat(entry.created).timestamp())
    return Model(id=model, created=created, version=entry.version, unserved=entry.unserved)
