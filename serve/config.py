"""What can be set of the server."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

GIB = 2**30
BUSY_RETRY_AFTER = 5.0
"""Seconds after which a client that found all replicas busy is told to come again."""


Names = Annotated[tuple[str, ...], BeforeValidator(lambda value: value.split(",") if isinstance(value, str) else value)]
"""Several names; on the command line with commas between them."""


class ServeConfig(BaseModel):
    """What can be written after `serve.app:app`, as `name=value`."""

    model_config = ConfigDict(extra="forbid")

    store: str
    """The subject store: a folder, or a URI such as s3://bucket/store, that every node can read."""
    keys: str | None = None
    """Folder of keys; by default STORE/keys. `python -m serve.keys` makes and revokes them."""
    without_keys: bool = False
    """Serve whoever is on this machine, without keys, and nobody else."""

    images: str | None = None
    """Folder or URI for the images that are asked for by URL; by default STORE/images."""
    image_minutes: float = Field(60.0, gt=0)
    """Minutes for which such an image can be fetched; then it is removed."""
    public_url: str | None = Field(None, pattern=r"^https?://[^\s?#]+$")
    """What those URLs start with, as https://example.org; by default what the client's request was sent to."""

    ingresses: int = Field(1, ge=1)
    """Processes that take requests and pass them on."""
    replicas: int = Field(1, ge=0)
    """Replicas for each backbone that the store has subjects of; at least so many when `max_replicas` is given."""
    max_replicas: int | None = Field(None, ge=1)
    """Up to so many replicas are started as requests come; `replicas=0` goes down to none when there are none."""
    ongoing_per_replica: float = Field(4.0, gt=0)
    """Requests, drawn and waiting, for which one replica is enough."""
    idle: float = Field(600.0, ge=0)
    """Seconds of less load before a replica is stopped."""
    surge: int = Field(0, ge=0, le=100)
    """Percent of the replicas that a new deployment starts beside the old ones before it stops any; without devices to
    spare for them it would wait, so at 0 old ones are stopped first."""
    gpus_per_replica: float = Field(0, ge=0, le=1)
    """GPUs of a replica; 0 draws on the CPU."""
    cpus_per_replica: int = Field(1, ge=1)
    """CPU cores of a replica. On the CPU they are its threads too, and so have a part in the last bits of an image."""
    precision: Literal["fp32", "bf16"] | None = None
    """Precision of the networks. By default bf16 on GPUs, fp32 on CPUs."""
    batch: int | None = Field(None, ge=1)
    """Images of a subject that are drawn together. By default 8 on GPUs, and 1 on CPUs: more gain less there, and an
    image that is drawn alone always has the same bytes."""

    host_memory: float = Field(8.0, gt=0)
    """GiB of host memory in which a replica keeps subjects' weights."""
    disk: str = "~/.cache/dreambooth/serve"
    """Folder in which a machine keeps versions of a remote store."""
    disk_space: float = Field(100.0, gt=0)
    """GiB that this folder may take."""
    keep: Names = ()
    """Models (`subject` or `subject@version`) that every replica loads when it starts and never drops."""
    escape: float = Field(8.0, ge=0)
    """How many more requests must wait for a subject's replica than for the next before that draws the subject too; 4
    times as many for a subject that alone makes less than a replica's share of the work."""

    queue: int = Field(64, ge=1)
    """Requests that may wait while all replicas are full (32 each); more are answered 429."""
    deadline: float = Field(300.0, gt=0)
    """Seconds that a request may take; also those that a replica has to finish its requests before it is stopped."""
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
