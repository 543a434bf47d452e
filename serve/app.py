"""The Ray Serve application: `serve run serve.app:app store=PATH` serves a store with keys on http://127.0.0.1:8000."""

# No `from __future__ import annotations` here: Ray Serve must find the type of `app`'s argument, not its name.

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig, HTTPOptions, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from dreambooth.storage import Location
from dreambooth.store import SubjectStore
from serve import errors, metrics
from serve.api import Rules, create_api, is_loopback
from serve.catalog import Catalog
from serve.files import ImageFiles
from serve.keys import folder_of
from serve.order import Drawn, Order
from serve.replica import SubjectReplica

GIB = 2**30
_TRIES = 3
_ONGOING = 32
_RETRY_AFTER = 5.0

Names = Annotated[tuple[str, ...], BeforeValidator(lambda value: value.split(",") if isinstance(value, str) else value)]
"""Several names; on the command line with commas between them."""


class Arguments(BaseModel):
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
    def _check(self) -> "Arguments":
        if self.max_replicas is None and self.replicas == 0:
            raise ValueError("replicas is 0, so nothing would ever be drawn: give max_replicas too")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}, less than replicas ({self.replicas})")
        return self


class Ingress:
    """Validates requests, finds their model, and passes them on to the replicas of its backbone."""

    def __init__(self, args: Arguments, replicas: dict[str, DeploymentHandle]) -> None:
        """Serve the versions in the store on the backbones of `replicas`, by hash."""
        metrics.label_by_replica()
        self._args, self._replicas = args, replicas

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The HTTP API; Ray Serve calls this once in each ingress process."""
        args = self._args
        keys = None if args.without_keys else folder_of(args.store, args.keys)
        store = SubjectStore(args.store)
        images = Location.of(args.images) if args.images else store.root / "images"
        files = ImageFiles(images, 60 * args.image_minutes)
        rules = Rules(keys, files, args.public_url, args.deadline, args.log_prompts)
        return create_api(Catalog(store, self._replicas), self._draw, rules)

    async def _draw(self, backbone: str, order: Order) -> AsyncIterator[Drawn]:
        sent = set()
        for tries_left in reversed(range(_TRIES)):
            answer = self._replicas[backbone].options(stream=True).draw.remote(order)
            try:
                async for drawn in answer:
                    if (drawn.number, drawn.preview) not in sent:
                        sent.add((drawn.number, drawn.preview))
                        yield drawn
                return
            except (asyncio.CancelledError, GeneratorExit):  # nobody waits any more: the replica stops after the step
                answer.cancel()
                raise
            except BackPressureError:
                raise errors.too_many("all replicas are busy: come again later", "overloaded", _RETRY_AFTER) from None
            except RayTaskError as error:
                raise error.cause from None
            except (RayActorError, ReplicaUnavailableError):  # seeds are fixed, so another replica draws the same
                if not tries_left:
                    message = f"{_TRIES} replicas were lost with this request: come again later"
                    raise errors.unavailable(message, "replica_lost", _RETRY_AFTER) from None


def app(args: Arguments) -> Application:
    """Build the application; ValueError when there is nothing to serve, or nothing that keeps strangers out."""
    _check_access(args)
    store = SubjectStore(args.store)
    entries = [entry for published in asyncio.run(Catalog(store).versions()).values() for entry in published]
    if not entries:
        raise ValueError(f"store {store.root} holds no published version: make one with pipelines/personalize.py")
    served = [entry for entry in entries if entry.unserved is None]
    if not served:
        first = entries[0]
        raise ValueError(f"nothing in {store.root} can be served: {first.subject}@{first.version}: {first.unserved}")
    names = {name for one in served for name in (one.subject, f"{one.subject}@{one.version}")}
    if unknown := sorted(set(args.keep) - names):
        raise ValueError(f"keep names {', '.join(unknown)}, which {store.root} does not hold or cannot be served")
    logging = LoggingConfig(encoding="JSON")
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        num_replicas=args.ingresses,
        max_ongoing_requests=1000,
        max_surge_percent=100,
        graceful_shutdown_timeout_s=args.deadline,
        ray_actor_options={"num_cpus": 0},
        logging_config=logging,
    )
    args = args.model_copy(update={"store": store.root.uri})
    replica = serve.deployment(SubjectReplica, **deployment_options(args), logging_config=logging)
    return ingress.bind(args, _bind_replicas(args, replica, {entry.backbone for entry in served}))


def _check_access(args: Arguments) -> None:
    if not args.without_keys:
        keys = folder_of(args.store, args.keys)
        if not keys.all():
            raise ValueError(
                f"there are no keys in {keys.folder}: make one with `python -m serve.keys make`, or say "
                "without_keys=true to serve everybody on this machine and nobody else"
            )
        return
    host = HTTPOptions().host
    if host is not None and not is_loopback(host):
        raise ValueError(
            f"Ray Serve would listen on {host}, and without keys only this machine may be served: unset "
            "RAY_SERVE_DEFAULT_HTTP_HOST and RAY_SERVE_ENABLE_HA_PROXY"
        )


def deployment_options(args: Arguments) -> dict[str, Any]:
    """How Ray Serve runs the replicas: how many, how many requests they take, and by which router."""
    if args.max_replicas is None:
        number: dict[str, Any] = {"num_replicas": args.replicas}
    else:
        autoscaling = AutoscalingConfig(
            min_replicas=args.replicas,
            max_replicas=args.max_replicas,
            target_ongoing_requests=args.ongoing_per_replica,
            downscale_delay_s=args.idle,
        )
        number = {"autoscaling_config": autoscaling}
    return {
        **number,
        "max_ongoing_requests": _ONGOING,
        "max_queued_requests": args.queue,
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=_RETRY_AFTER),
        "graceful_shutdown_timeout_s": args.deadline,
        "max_surge_percent": args.surge,
        "request_router_config": RequestRouterConfig(
            request_router_class="serve.router:SubjectRouter", request_router_kwargs={"escape": args.escape}
        ),
        "ray_actor_options": {"num_cpus": args.cpus_per_replica, "num_gpus": args.gpus_per_replica},
    }


def _bind_replicas(args: Arguments, replica: Any, backbones: set[str]) -> dict[str, Any]:
    on_gpu = args.gpus_per_replica > 0
    return {
        backbone: replica.options(name=f"subjects-{backbone[:12]}").bind(
            args.store,
            backbone,
            precision=args.precision or ("bf16" if on_gpu else "fp32"),
            device="cuda" if on_gpu else "cpu",
            threads=args.cpus_per_replica,
            batch=args.batch or (8 if on_gpu else 1),
            host_memory=int(args.host_memory * GIB),
            disk=args.disk,
            disk_space=int(args.disk_space * GIB),
            keep=args.keep,
            wedged_after=args.wedged_after,
        )
        for backbone in sorted(backbones)
    }
