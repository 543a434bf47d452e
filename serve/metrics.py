"""Prometheus metrics; no label grows with the number of subjects, keys or requests.

Ray Serve's own metrics take the labels of a replica only when they are made inside it, and a module is imported before:
these are plain ones, labelled when a replica starts.
"""

from __future__ import annotations

from ray import serve
from ray.serve.exceptions import RayServeException
from ray.util import metrics

_REPLICA = ("deployment", "replica")
_SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300]

seconds = metrics.Histogram(
    "dreambooth_seconds",
    "Seconds by stage: load (into host memory), wait (for the device), swap, sample, encode (PNG), answer (all of it).",
    boundaries=_SECONDS,
    tag_keys=(*_REPLICA, "stage"),
)
reads = metrics.Counter(
    "dreambooth_subject_reads",
    "Versions read, by the nearest place that had them (host, disk or store).",
    tag_keys=(*_REPLICA, "tier"),
)
swaps = metrics.Counter("dreambooth_swaps", "Versions copied onto the device.", tag_keys=_REPLICA)
host_bytes = metrics.Gauge("dreambooth_host_bytes", "Bytes of subjects' tensors in host memory.", tag_keys=_REPLICA)
waiting = metrics.Gauge("dreambooth_waiting_images", "Images that wait for the device.", tag_keys=_REPLICA)
batches = metrics.Histogram(
    "dreambooth_batch_images", "Images drawn together.", boundaries=[1, 2, 4, 8, 16, 32, 64], tag_keys=_REPLICA
)
answers = metrics.Counter(
    "dreambooth_answers", "Answers to image requests, by HTTP status.", tag_keys=(*_REPLICA, "status")
)


def label(deployment: str, replica: str) -> None:
    """Set the labels of all metrics of this process."""
    for metric in (seconds, reads, swaps, host_bytes, waiting, batches, answers):
        metric.set_default_tags({"deployment": deployment, "replica": replica})


def label_by_replica() -> None:
    """Label all metrics by the replica that this process is; called when the replica starts."""
    try:
        context = serve.get_replica_context()
    except RayServeException:  # outside Ray Serve, as in tests
        return
    label(context.deployment, context.replica_tag)


label("", "")
