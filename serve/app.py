"""The Ray Serve application: `serve run serve.app:app store=PATH` serves a subject store on http://127.0.0.1:8000.

Not here yet: authentication (so it refuses to listen beyond this machine), a router of our own (Ray Serve's default
sends a subject to any replica), batching, autoscaling, bounded queues and deadlines.
"""

# No `from __future__ import annotations` here: Ray Serve must find the type of `app`'s argument, not its name.

from collections.abc import AsyncIterator
from typing import Annotated, Literal

from fastapi import FastAPI
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve import Application
from ray.serve.config import HTTPOptions
from ray.serve.handle import DeploymentHandle

from dreambooth.store import SubjectStore
from serve.api import create_api, is_loopback
from serve.catalog import Catalog
from serve.order import Drawn, Order
from serve.replica import SubjectReplica

GIB = 2**30

Names = Annotated[tuple[str, ...], BeforeValidator(lambda value: value.split(",") if isinstance(value, str) else value)]
"""Several names; on the command line with commas between them."""


class Arguments(BaseModel):
    """What can be written after `serve.app:app`, as `name=value`."""

    model_config = ConfigDict(extra="forbid")

    store: str
    """The subject store: a folder, or a URI such as s3://bucket/store, that every node can read."""
    replicas: int = Field(1, ge=1)
    """Replicas for each backbone that the store has subjects of."""
    gpus_per_replica: float = Field(0, ge=0, le=1)
    """GPUs of a replica; 0 draws on the CPU."""
    cpus_per_replica: int = Field(1, ge=1)
    """CPU cores of a replica. On the CPU they are its threads too, and so have a part in the last bits of an image."""
    precision: Literal["fp32", "bf16"] | None = None
    """Precision of the networks. By default bf16 on GPUs, fp32 on CPUs."""
    host_memory: float = Field(8.0, gt=0)
    """GiB of host memory in which a replica keeps subjects' weights."""
    disk: str = "~/.cache/dreambooth/serve"
    """Folder in which a machine keeps versions of a remote store."""
    disk_space: float = Field(100.0, gt=0)
    """GiB that this folder may take."""
    keep: Names = ()
    """Models (`subject` or `subject@version`) that every replica loads when it starts and never drops."""
    batch: int | None = Field(None, ge=1)
    """Images of a subject that are drawn together; by default 8 on GPUs, and 1 on CPUs, which gain nothing by more."""
    wedged_after: float = Field(300.0, gt=0)
    """Seconds that one step may take before the replica counts as stuck and is replaced."""


class Ingress:
    """Validates requests, finds their model, and passes them on to the replicas of its backbone."""

    def __init__(self, store_uri: str, replicas: dict[str, DeploymentHandle]) -> None:
        """Serve the versions in the store on the backbones of `replicas`, by hash."""
        self._store_uri, self._replicas = store_uri, replicas

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The HTTP API; Ray Serve calls this once in each ingress process."""
        return create_api(Catalog(SubjectStore(self._store_uri), self._replicas), self._draw)

    async def _draw(self, backbone: str, order: Order) -> AsyncIterator[Drawn]:
        answer = self._replicas[backbone].options(stream=True).draw.remote(order)
        try:
            async for drawn in answer:
                yield drawn
        except RayTaskError as error:
            raise error.cause from None
        finally:
            answer.cancel()


def app(args: Arguments) -> Application:
    """Build the application; ValueError when there is nothing to serve, or when it would listen beyond this machine."""
    host = HTTPOptions().host
    if host is not None and not is_loopback(host):
        raise ValueError(
            f"Ray Serve would listen on {host}, and there is no authentication yet: unset RAY_SERVE_DEFAULT_HTTP_HOST "
            "and RAY_SERVE_ENABLE_HA_PROXY"
        )
    store = SubjectStore(args.store)
    versions = [version for subject in store.subjects() for version in store.versions(subject)]
    if not versions:
        raise ValueError(f"store {store.root} holds no published version: make one with pipelines/personalize.py")
    names = {name for one in versions for name in (one.subject, f"{one.subject}@{one.id}")}
    if unknown := sorted(set(args.keep) - names):
        raise ValueError(f"keep names {', '.join(unknown)}, which {store.root} does not hold")
    on_gpu = args.gpus_per_replica > 0
    replica = serve.deployment(
        SubjectReplica,
        num_replicas=args.replicas,
        max_ongoing_requests=32,
        ray_actor_options={"num_cpus": args.cpus_per_replica, "num_gpus": args.gpus_per_replica},
    )
    replicas = {
        backbone: replica.options(name=f"subjects-{backbone[:12]}").bind(
            store.root.uri,
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
        for backbone in sorted({version.manifest["backbone"]["hash"] for version in versions})
    }
    ingress = serve.deployment(serve.ingress()(Ingress), max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})
    return ingress.bind(store.root.uri, replicas)
