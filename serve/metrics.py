"""What the application counts, for Prometheus; no label grows with the number of subjects, keys or requests."""

from __future__ import annotations

from ray.serve import metrics

_SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300]

seconds = metrics.Histogram(
    "dreambooth_seconds",
    "Seconds by stage: load (into host memory), wait (for the device), swap, sample, encode (PNG), answer (all of it).",
    boundaries=_SECONDS,
    tag_keys=("stage",),
)
reads = metrics.Counter(
    "dreambooth_subject_reads", "Subjects asked for, by the nearest tier that had them.", tag_keys=("tier",)
)
swaps = metrics.Counter("dreambooth_swaps", "Subjects copied onto the device.")
host_bytes = metrics.Gauge("dreambooth_host_bytes", "Bytes of subjects' tensors in host memory.")
waiting = metrics.Gauge("dreambooth_waiting_images", "Images that wait for the device.")
batches = metrics.Histogram("dreambooth_batch_images", "Images drawn together.", boundaries=[1, 2, 4, 8, 16, 32, 64])
answers = metrics.Counter("dreambooth_answers", "Answers to image requests, by HTTP status.", tag_keys=("status",))
