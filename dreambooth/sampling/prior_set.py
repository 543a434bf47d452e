"""Class-prior sets: images "a [class noun]" of the frozen backbone, named by what determines them.

A set is endless: image i has its own seed, and shards of `sampler.batch` images are drawn and written together. What a
shard holds depends on the set's key and the shard's number alone, so a shard may be made anywhere, at any time, even
twice, and a larger request extends what a smaller one made.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dreambooth.common.contact_sheet import Row, contact_sheet
from dreambooth.common.images import png_bytes, read_image
from dreambooth.common.keys import key_form
from dreambooth.common.location import Location, digest
from dreambooth.common.streams import image_seed
from dreambooth.sampling.sampler import SamplerSettings

_PREVIEWED = 24

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "index": pa.int64(),
        "prompt": pa.string(),
        "seed": pa.int64(),
        "backbone": pa.string(),
        "png": pa.binary(),
        "latent_shape": pa.list_(pa.int32(), 3),
        "latent_mean": pa.binary(),
        "latent_log_variance": pa.binary(),
    }
)
"""One row an image; latents are little-endian float32 of `latent_shape` (channels, height, width)."""


@dataclass(frozen=True)
class PriorSet:
    """The class-prior set of a backbone, prompt, sampler and seed."""

    backbone: str
    prompt: str
    sampler: SamplerSettings
    seed: int

    @cached_property
    def key(self) -> str:
        """The content address."""
        return digest(key_form(self), 32)

    def as_dict(self) -> dict[str, Any]:
        """A JSON-like form; `from_dict` reads it."""
        return {
            "backbone": self.backbone,
            "prompt": self.prompt,
            "sampler": self.sampler.as_dict(),
            "seed": self.seed,
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> PriorSet:
        """The set that `as_dict` described."""
        return cls(**{**value, "sampler": SamplerSettings(**value["sampler"])})

    def location(self, store: Location) -> Location:
        """The set's folder in a store."""
        return store / "priors" / self.key

    def shards(self, count: int) -> range:
        """The shards that hold the first `count` images."""
        return range(-(-count // self.sampler.batch))

    def indices(self, shard: int) -> range:
        """The images of a shard."""
        return range(shard * self.sampler.batch, (shard + 1) * self.sampler.batch)

    def seeds(self, shard: int) -> list[int]:
        """The seeds of a shard's images: of the set's seed, prompt and the image's index alone.

        So sets that differ in batch, threads or precision hold the same images but for rounding.
        """
        noise = digest({"prompt": self.prompt, "seed": self.seed})
        return [image_seed(noise, index) for index in self.indices(shard)]

    def present(self, store: Location) -> set[int]:
        """The shards that are in the store."""
        names = self.location(store).names()
        return {int(name.removesuffix(".parquet")) for name in names if name.endswith(".parquet")}

    def has_shard(self, store: Location, shard: int) -> bool:
        """Whether the shard is in the store."""
        return self._shard(store, shard).exists()

    def _shard(self, store: Location, shard: int) -> Location:
        return self.location(store) / f"{shard:06d}.parquet"

    def write_shard(
        self, store: Location, shard: int, images: np.ndarray, mean: np.ndarray, log_variance: np.ndarray
    ) -> None:
        """Write a shard atomically: `images` uint8 (B, H, W, 3), latents float32 (B, C, h, w). Twice is harmless."""
        rows = [
            {
                "id": f"{self.key}-{index:06d}",
                "index": index,
                "prompt": self.prompt,
                "seed": seed,
                "backbone": self.backbone,
                "png": png_bytes(Image.fromarray(images[position])),
                "latent_shape": list(mean.shape[1:]),
                "latent_mean": mean[position].astype("<f4").tobytes(),
                "latent_log_variance": log_variance[position].astype("<f4").tobytes(),
            }
            for position, (index, seed) in enumerate(zip(self.indices(shard), self.seeds(shard), strict=True))
        ]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), buffer)
        settings = self.location(store) / "set.json"
        if not settings.exists():
            settings.write_json(self.as_dict())
        self._shard(store, shard).write_bytes(buffer.getvalue())

    def rows(self, store: Location, count: int, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The first `count` images in order, with these columns; FileNotFoundError when a shard is missing."""
        for shard in self.shards(count):
            data = self._shard(store, shard).read_bytes()
            table = pq.read_table(io.BytesIO(data), columns=list(columns))
            yield from table.slice(0, max(0, count - shard * self.sampler.batch)).to_pylist()

    def write_preview(self, store: Location, count: int) -> Location:
        """Lay out the first of `count` images as a contact sheet beside the set; returns where it is."""
        rows = list(self.rows(store, min(count, _PREVIEWED), ["id", "png"]))
        pictures = [read_image(row["png"], row["id"]) for row in rows]
        title = f"the first {len(rows)} of {count} class-prior images, seed {self.seed}"
        preview = self.location(store) / "preview.png"
        preview.write_bytes(png_bytes(contact_sheet(self.prompt, [Row(title, pictures)])))
        return preview


def latent(row: dict[str, Any], column: str) -> np.ndarray:
    """A latent of a row, float32 (C, h, w)."""
    return np.frombuffer(row[column], dtype="<f4").reshape(row["latent_shape"])
