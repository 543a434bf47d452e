"""The Ray Serve application: `serve run serve.app:app store=PATH` serves a subject store on http://127.0.0.1:8000.

Not here yet: authentication (so it refuses to listen beyond this machine), a router of our own (Ray Serve's default
sends a subject to any replica), batching, autoscaling, bounded queues and deadlines.
"""

# No `from __future__ import annotations` here: Ray Serve must find the type of `app`'s argument, not its name.

from typing import Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve import Application
from ray.serve.config import HTTPOptions
from ray.serve.handle import DeploymentHandle

from dreambooth.store import SubjectStore
from serve.api import Catalog, create_api, is_loopback
from serve.replica import Order, SubjectReplica

GIB = 2**30


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


class Ingress:
    """Validates requests, finds their model, and passes them on to the replicas of its backbone."""

    def __init__(self, store_uri: str, replicas: dict[str, DeploymentHandle]) -> None:
        """Serve the versions in the store on the backbones of `replicas`, by hash."""
        self._store_uri, self._replicas = store_uri, replicas

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The HTTP API; Ray Serve calls this once in each ingress process."""
        return create_api(Catalog(SubjectStore(self._store_uri), self._replicas), self._draw)

    async def _draw(self, backbone: str, order: Order) -> list[bytes]:
        try:
            return await self._replicas[backbone].draw.remote(order)
        except RayTaskError as error:
            raise error.cause from None


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
    on_gpu = args.gpus_per_replica > 0
    replica = serve.deployment(
        SubjectReplica,
        num_replicas=args.replicas,
        max_ongoing_requests=1,
        ray_actor_options={"num_cpus": args.cpus_per_replica, "num_gpus": args.gpus_per_replica},
    )
    replicas = {
        backbone: replica.options(name=f"subjects-{backbone[:12]}").bind(
            store.root.uri,
            backbone,
            precision=args.precision or ("bf16" if on_gpu else "fp32"),
            device="cuda" if on_gpu else "cpu",
            threads=args.cpus_per_replica,
            host_memory=int(args.host_memory * GIB),
        )
        for backbone in sorted({version.manifest["backbone"]["hash"] for version in versions})
    }
    ingress = serve.deployment(serve.ingress()(Ingress), max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})
    return ingress.bind(store.root.uri, replicas)
