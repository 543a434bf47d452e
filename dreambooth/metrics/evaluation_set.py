"""What a version is scored on: pictures that it draws of the subject for each prompt, and of its class.

Like a class-prior set it is named by what determines it, and lies in shards that anyone may make at any time, even
twice.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dreambooth.common.images import png_bytes, read_image
from dreambooth.common.keys import key_form
from dreambooth.common.location import Location, digest
from dreambooth.common.streams import image_seed
from dreambooth.sampling.sampler import SamplerSettings
from dreambooth.subjects.prompts import class_prompt, fill

SCHEMA = pa.schema(
    {"template": pa.string(), "prompt": pa.string(), "index": pa.int64(), "seed": pa.int64(), "png": pa.binary()}
)
"""One row a picture. The template is that of the prompt; of pictures of the class it is null."""


@dataclass(frozen=True)
class EvaluationSet:
    """The pictures of one version."""

    subject: str
    version: str
    phrase: str
    """What the subject is called in prompts."""
    class_noun: str
    templates: tuple[str, ...]
    images_a_prompt: int
    class_images: int
    samplers: tuple[SamplerSettings, ...]
    """How each stage of the version's cascade draws; mostly it has one."""
    seed: int

    @cached_property
    def key(self) -> str:
        """The content address."""
        return digest(key_form(self), 32)

    def location(self, store: Location) -> Location:
        """The set's folder in a store."""
        return store / "evaluations" / self.key

    @cached_property
    def shards(self) -> list[tuple[str | None, range]]:
        """The template, or None of the class, and the pictures of it that each shard holds."""
        wanted = [*((template, self.images_a_prompt) for template in self.templates), (None, self.class_images)]
        batch = self.samplers[0].batch
        return [
            (template, range(start, min(start + batch, count)))
            for template, count in wanted
            for start in range(0, count, batch)
        ]

    @property
    def count(self) -> int:
        """How many pictures there are in all."""
        return len(self.templates) * self.images_a_prompt + self.class_images

    def prompt(self, template: str | None) -> str:
        """What is drawn."""
        return class_prompt(self.class_noun) if template is None else fill(template, self.phrase)

    def seeds(self, shard: int) -> list[int]:
        """The seeds of a shard's pictures: those of every version and method for the same template, so they compare."""
        template, indices = self.shards[shard]
        noise = digest({"template": template, "seed": self.seed})
        return [image_seed(noise, index) for index in indices]

    def present(self, store: Location) -> set[int]:
        """The shards that are in the store."""
        names = self.location(store).names()
        return {int(name.removesuffix(".parquet")) for name in names if name.endswith(".parquet")}

    def write_shard(self, store: Location, shard: int, pictures: list[Image.Image]) -> None:
        """Write a shard atomically."""
        template, indices = self.shards[shard]
        rows = [
            {
                "template": template,
                "prompt": self.prompt(template),
                "index": index,
                "seed": seed,
                "png": png_bytes(picture),
            }
            for index, seed, picture in zip(indices, self.seeds(shard), pictures, strict=True)
        ]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), buffer)
        settings = self.location(store) / "set.json"
        if not settings.exists():
            settings.write_json(asdict(self))
        self._shard(store, shard).write_bytes(buffer.getvalue())

    def pictures(self, store: Location) -> dict[str | None, list[Image.Image]]:
        """All pictures by template, those of the class under None; FileNotFoundError when a shard is missing."""
        found: dict[str | None, list[Image.Image]] = {}
        for row in self._rows(store):
            name = f"{self.subject}@{self.version}: {row['prompt']}"
            found.setdefault(row["template"], []).append(read_image(row["png"], name))
        return found

    def _rows(self, store: Location) -> Iterator[dict[str, Any]]:
        for shard in range(len(self.shards)):
            yield from pq.read_table(io.BytesIO(self._shard(store, shard).read_bytes())).to_pylist()

    def _shard(self, store: Location, shard: int) -> Location:
        return self.location(store) / f"{shard:06d}.parquet"
