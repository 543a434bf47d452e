"""The Ray Serve application: `serve run serve.app:app store=PATH` serves a store with keys on http://127.0.0.1:8000."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig, HTTPOptions, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from dreambooth.store import SubjectStore
from serve.catalog.catalog import Entry
from serve.config import BUSY_RETRY_AFTER, GIB, ServeConfig, read_config
from serve.engine.replica import SubjectReplica
from serve.ingress.ingress import Ingress
from serve.preflight import check_reach, find_versions

_ONGOING = 32


def app(settings: ServeConfig | Mapping[str, Any]) -> Application:
    """Check the settings and build the application: what `serve run` and `serve deploy` call with their arguments.

    Raises InvalidInput for a wrong setting, when there is nothing to serve, and when strangers would be let in.
    """
    config = settings if isinstance(settings, ServeConfig) else read_config(settings)
    check_reach(config, HTTPOptions().host, "unset RAY_SERVE_DEFAULT_HTTP_HOST and RAY_SERVE_ENABLE_HA_PROXY")
    return build_application(config, find_versions(config))


def build_application(config: ServeConfig, versions: Sequence[Entry]) -> Application:
    """The ingress, and replicas for each backbone of the versions."""
    config = config.model_copy(update={"store": SubjectStore(config.store).root.uri})
    logging = LoggingConfig(encoding="JSON")
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        num_replicas=config.ingresses,
        max_ongoing_requests=1000,
        max_surge_percent=100,
        graceful_shutdown_timeout_s=config.deadline,
        ray_actor_options={"num_cpus": 0},
        logging_config=logging,
    )
    replica = serve.deployment(SubjectReplica, **deployment_options(config), logging_config=logging)
    return ingress.bind(config, _bind_replicas(config, replica, {entry.backbone for entry in versions}))


def deployment_options(config: ServeConfig) -> dict[str, Any]:
    """Options of the replicas' deployment: their number, the requests they take, and the router to them."""
    if config.max_replicas is None:
        number: dict[str, Any] = {"num_replicas": config.replicas}
    else:
        autoscaling = AutoscalingConfig(
            min_replicas=config.replicas,
            max_replicas=config.max_replicas,
            target_ongoing_requests=config.ongoing_per_replica,
            downscale_delay_s=config.idle,
        )
        number = {"autoscaling_config": autoscaling}
    return {
        **number,
        "max_ongoing_requests": _ONGOING,
        "max_queued_requests": config.queue,
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=BUSY_RETRY_AFTER),
        "graceful_shutdown_timeout_s": config.deadline,
        "max_surge_percent": config.surge,
        "request_router_config": RequestRouterConfig(
            request_router_class="serve.ingress.router:SubjectRouter", request_router_kwargs={"escape": config.escape}
        ),
        "ray_actor_options": {"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica},
    }


def _bind_replicas(config: ServeConfig, replica: Any, backbones: set[str]) -> dict[str, Any]:
    on_gpu = config.gpus_per_replica > 0
    return {
        backbone: replica.options(name=f"subjects-{backbone[:12]}").bind(
            config.store,
            backbone,
            precision=config.precision or ("bf16" if on_gpu else "fp32"),
            device="cuda" if on_gpu else "cpu",
            threads=config.cpus_per_replica,
            batch=config.batch or (8 if on_gpu else 1),
            host_memory=int(config.host_memory * GIB),
            disk=config.disk,
            disk_space=int(config.disk_space * GIB),
            keep=config.keep,
            wedged_after=config.wedged_after,
        )
        for backbone in sorted(backbones)
    }
