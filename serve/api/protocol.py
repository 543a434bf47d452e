"""The bodies of requests and answers, in the form of OpenAI's images API. Their texts are part of the API document."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat

SEEDS = 2**32  # torch's CPU generator keeps the low 32 bits of a seed


def _as_integer(value: object) -> object:
    """1.0 as 1: to JSON Schema both are integers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Integer = BeforeValidator(_as_integer)


class ImagesRequest(BaseModel):
    """Body of `POST /v1/images/generations`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(max_length=200, description="A subject, for its newest version, or `subject@version`.")
    prompt: str = Field(
        min_length=1,
        max_length=4000,
        description="`{subject}` in it stands for what the subject is called.",
    )
    n: Annotated[int, Field(ge=1, le=10), _Integer] = Field(1, description="Number of images.")
    size: str | None = Field(
        None, pattern=r"^[1-9]\d{1,4}x[1-9]\d{1,4}$", description="`WIDTHxHEIGHT`; by default as the model was trained."
    )
    response_format: Literal["b64_json", "url"] = Field(
        "b64_json", description="`url` answers with addresses from which the images can be fetched for a while."
    )
    output_format: Literal["png"] = "png"
    seed: Annotated[int, Field(ge=0, lt=SEEDS), _Integer] | None = Field(
        None, description="Seed of the first image, each next one's is 1 higher; by default random."
    )
    num_inference_steps: Annotated[int, Field(ge=1, le=200), _Integer] | None = Field(
        None, description="By default as the model's samples."
    )
    guidance_scale: Annotated[FiniteFloat, Field(ge=0, le=50)] | None = Field(
        None, description="By default as the model's samples."
    )
    negative_prompt: str | None = Field(None, max_length=4000)
    stream: bool = Field(False, description="Answer with server-sent events, each image as soon as it is there.")
    partial_images: Annotated[int, Field(ge=0, le=3), _Integer] = Field(
        0, description="Unfinished images to send of each image; only with `stream`."
    )
    deadline: Annotated[FiniteFloat, Field(ge=1)] | None = Field(
        None, description="Seconds after which the answer is of no use; at most, and by default, the server's own."
    )


class GeneratedImage(BaseModel):
    """One image; asked for again with its seed and version it comes out the same."""

    b64_json: str | None = Field(None, description="A PNG file in base64, unless a URL was asked for.")
    url: str | None = Field(None, description="Where to fetch the PNG file, without a key, for a while.")
    revised_prompt: str = Field(description="The prompt as the model saw it.")
    seed: int
    batch: int = Field(description="How many images were drawn together; in other numbers they may round differently.")


class ImagesResponse(BaseModel):
    """Answer to `POST /v1/images/generations`."""

    created: int = Field(description="Unix time.")
    model: str = Field(description="The version that drew the images, as `subject@version`.")
    version: str
    size: str
    data: list[GeneratedImage]
    seconds: float = Field(description="Time from the request to the last image.")
    warning: str | None = None


class _ImageEvent(BaseModel):
    b64_json: str
    created_at: int = Field(description="Unix time.")
    size: str
    seed: int
    model: str
    output_format: Literal["png"] = "png"
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"


class PartialImageEvent(_ImageEvent):
    """An unfinished image, while it is drawn."""

    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    partial_image_index: int


class CompletedEvent(_ImageEvent):
    """A finished image."""

    type: Literal["image_generation.completed"] = "image_generation.completed"
    revised_prompt: str
    batch: int
    warning: str | None


class Error(BaseModel):
    """What went wrong; `param` names the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every answer that is not a success."""

    error: Error


EVENT_STREAM = {
    "schema": {
        "type": "object",
        "description": "A server-sent event; its data is a JSON object.",
        "properties": {
            "event": {"enum": ["image_generation.partial_image", "image_generation.completed", "error"]},
            "data": {
                "type": "string",
                "contentMediaType": "application/json",
                "contentSchema": {
                    "anyOf": [
                        PartialImageEvent.model_json_schema(),
                        CompletedEvent.model_json_schema(),
                        {"$ref": "#/components/schemas/ErrorResponse"},
                    ]
                },
            },
        },
        "required": ["event", "data"],
    }
}
"""A streamed answer to `POST /v1/images/generations`, for the OpenAPI document."""


class Model(BaseModel):
    """A subject, or one version of it."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Unix time of publication.")
    owned_by: str = "dreambooth"
    version: str = Field(description="For a subject, its newest.")
    unserved: str | None = Field(None, description="Why no images of it can be drawn; null when they can.")


class ModelList(BaseModel):
    """Answer to `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


class ModelDetails(Model):
    """Answer to `GET /v1/models/{model}`."""

    lineage: dict[str, Any] = Field(description="The version's manifest: backbone, images, settings, files.")
    scores: list[dict[str, Any]] = Field(description="What judges say of it, a record for each protocol and photos.")


class KeyEntry(BaseModel):
    """A key without its secret."""

    id: str
    tenant: str
    subjects: list[str]
    created: str
    images_per_minute: int | None
    largest_side: int | None
    admin: bool


class KeyList(BaseModel):
    """Answer to `GET /v1/admin/keys`."""

    object: Literal["list"] = "list"
    data: list[KeyEntry]
