"""The settings of the server."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

import click
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

GIB = 2**30
BUSY_RETRY_AFTER = 5.0
"""Seconds after which a client that found all replicas busy is told to come again."""


class InvalidInput(click.ClickException, ValueError):
    """Settings or a store that cannot be served. `serve run` prints such an error in one line."""

    exit_code = 2


def _split(value: str | list[str] | tuple[str, ...]) -> list[str]:
    return [name for part in ([value] if isinstance(value, str) else value) for name in part.split(",")]


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
"""Several names; on a command line with commas between them."""


class ServeConfig(BaseModel):
    """The settings, as `name=value` after `serve run serve.app:app`, and as `--name value` of `dreambooth serve`."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    store: str
    """The subject store: a folder, or a URI such as s3://bucket/store, that every node can read."""
    keys: str | None = None
    """Folder of keys; by default STORE/keys. `dreambooth keys` makes and revokes them."""
    without_keys: bool = False
    """Serve every client on this machine, without keys, and no other."""

    images: str | None = None
    """Folder or URI for the images that are requested by URL; by default STORE/images."""
    image_minutes: float = Field(60.0, gt=0)
    """Minutes for which such an image can be fetched; then it is removed."""
    public_url: str | None = Field(None, pattern=r"^https?://[^\s?#]+$")
    """What those URLs start with, as https://example.org; by default the address that the request was sent to."""

    ingresses: int = Field(1, ge=1)
    """Processes that accept requests and pass them to the replicas."""
    replicas: int = Field(1, ge=0)
    """Replicas for each backbone of the store; with a maximum, the fewest."""
    max_replicas: int | None = Field(None, ge=1)
    """Scale up to this many replicas as requests come, and down to `replicas` (0 is allowed) as they cease. By default
    the number is fixed."""
    ongoing_per_replica: float = Field(4.0, gt=0)
    """Requests, running and queued, for which one replica is enough."""
    idle: float = Field(600.0, ge=0)
    """Seconds of lower load before a replica is stopped."""
    surge: int = Field(0, ge=0, le=100)
    """Percent of the replicas that a new deployment starts before it stops any old ones. It waits for devices to be
    free for them; at 0 old replicas are stopped first."""
    gpus_per_replica: float = Field(0, ge=0, le=1)
    """GPUs of a replica; 0 draws on the CPU."""
    cpus_per_replica: int = Field(1, ge=1)
    """CPU cores of a replica. On the CPU they are its threads too, and so affect the last bits of an image."""
    precision: Literal["fp32", "bf16"] | None = None
    """Precision of the networks; by default bf16 on GPUs, fp32 on CPUs."""
    batch: int | None = Field(None, ge=1)
    """Most images of a subject that are drawn together; by default 8 on GPUs, and 1 on CPUs: more gain less there, and
    an image that is drawn alone always has the same bytes."""

    host_memory: float = Field(8.0, gt=0)
    """GiB of host memory in which a replica caches the weights of versions."""
    disk: str = "~/.cache/dreambooth/serve"
    """Folder in which a machine caches versions of a remote store."""
    disk_space: float = Field(100.0, gt=0)
    """GiB that this folder may take."""
    keep: Names = ()
    """Models (SUBJECT or SUBJECT@VERSION) that every replica loads when it starts and never evicts."""
    escape: float = Field(8.0, ge=0)
    """Difference in queue length from which a subject is drawn by the next replica too; 4 times this for a subject that
    alone makes less than one replica's share of the requests."""

    queue: int = Field(64, ge=1)
    """Requests that may wait while all replicas are full (32 each); more are answered 429."""
    deadline: float = Field(300.0, gt=0)
    """Seconds that a request may take; also those in which a replica finishes its requests before it is stopped."""
    wedged_after: float = Field(300.0, gt=0)
    """Seconds that one step may take before the replica counts as stuck and is replaced."""
    log_prompts: bool = False
    """Log prompts. Images are never logged."""

    @model_validator(mode="after")
    def _check(self) -> ServeConfig:
        if self.max_replicas is None and self.replicas == 0:
            raise ValueError("replicas is 0, so nothing would ever be drawn: give max_replicas too")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}, less than replicas ({self.replicas})")
        return self


def read_config(settings: Mapping[str, Any], spelled: Callable[[str], str] = str) -> ServeConfig:
    """The settings, checked; InvalidInput names the first that is wrong, as `spelled` writes its name."""
    try:
        return ServeConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        message = f"{spelled(name)} is missing: {ServeConfig.model_fields[name].description}"
    elif first["type"] == "extra_forbidden":
        message = f"unknown argument {spelled(name)}: {nearest(name, ServeConfig.model_fields, spelled)}"
    elif name:
        message = f"{spelled(name)} is {first['input']!r}: {message[0].lower()}{message[1:]}"
    raise InvalidInput(message)


def nearest(name: str, names: Iterable[str], spelled: Callable[[str], str] = str) -> str:
    """Tells which of `names` is nearest to a name that does not exist."""
    return f"the nearest valid one is {spelled(difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)[0])}"
