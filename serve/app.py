"""The Ray Serve application: `serve run serve.app:app store=PATH` serves a store with keys on http://127.0.0.1:8000."""

# No `from __future__ import annotations` here: Ray Serve must find the type of `app`'s argument, not its name.

import asyncio
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig, HTTPOptions, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from dreambooth.store import SubjectStore
from serve.api.auth import folder_of, is_loopback
from serve.catalog.catalog import Catalog
from serve.config import BUSY_RETRY_AFTER, GIB, ServeConfig
from serve.engine.replica import SubjectReplica
from serve.ingress.ingress import Ingress

_ONGOING = 32


def app(args: ServeConfig) -> Application:
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


def _check_access(args: ServeConfig) -> None:
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


def deployment_options(args: ServeConfig) -> dict[str, Any]:
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
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=BUSY_RETRY_AFTER),
        "graceful_shutdown_timeout_s": args.deadline,
        "max_surge_percent": args.surge,
        "request_router_config": RequestRouterConfig(
            request_router_class="serve.ingress.router:SubjectRouter", request_router_kwargs={"escape": args.escape}
        ),
        "ray_actor_options": {"num_cpus": args.cpus_per_replica, "num_gpus": args.gpus_per_replica},
    }


def _bind_replicas(args: ServeConfig, replica: Any, backbones: set[str]) -> dict[str, Any]:
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
