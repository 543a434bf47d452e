"""The training set of a run: latents and text of the instance and class-prior images, encoded once.

The autoencoder is always frozen, so train workers get latents and never load it. The text encoders are frozen unless
they are trained: then the workers get token ids instead of embeddings.
"""

from __future__ import annotations

from dreambooth.common.location import Location
from dreambooth.runs import RunSpec
from dreambooth.store import SubjectStore

KINDS = ("instance", "prior")


def location_of(store: SubjectStore, run: RunSpec) -> Location:
    """Where the run's training set is: a safetensors file.

    For every bucket of HEIGHTxWIDTH pixels in which photos are shown, `instance.HEIGHTxWIDTH.mean` and `.log_variance`
    (photos, views, C, h, w), `.time_ids` and such (photos, views, ...) and `.prompt` (photos, views), which says which
    row of `text.NAME` (prompts, ...) or `ids.NAME` (prompts, length) labels it; `prior.HEIGHTxWIDTH.*` likewise.
    """
    return store.root / "runs" / run.key / "training_set.safetensors"
