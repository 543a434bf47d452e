"""Drawing and scoring the pictures of versions, with Ray Data: what the store has not got."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from dreambooth.common.contact_sheet import Row, contact_sheet
from dreambooth.common.images import png_bytes, read_image
from dreambooth.common.keys import key_form
from dreambooth.common.location import Location, digest
from dreambooth.metrics.evaluation_set import EvaluationSet
from dreambooth.metrics.scores import Judges, Judging
from dreambooth.runs import Resources
from dreambooth.store import SubjectStore, Version
from dreambooth.subjects.manifest import SubjectSpec
from dreambooth.subjects.photos import Subject, load_subject
from dreambooth.subjects.prompts import fill
from dreambooth.versions.pipeline import VersionPipeline
from pipelines.runtime.actor_pools import map_on_actors, pool_size
from pipelines.runtime.console import Display

T = TypeVar("T")

_PICTURES_A_ROW = 32
"""What a worker draws between two looks at what is next: loading a version's weights costs about as much as some."""
_VERSIONS_A_ROUND = 64
"""Versions whose photos are held in memory at a time."""


@dataclass(frozen=True)
class PlannedEvaluation:
    """A version, where the photos are that it is held against, and the pictures to draw."""

    spec: SubjectSpec
    version: Version
    pictures: EvaluationSet

    def photos(self) -> Subject:
        """Read and check the photos."""
        return load_subject(self.spec.name, self.spec.images, self.pictures.class_noun)


@dataclass(frozen=True)
class Scored:
    """The scores of a version, as they lie in the store, or why there are none."""

    subject: str
    version: str
    record: Mapping[str, Any]
    failure: str = ""


def draw_pictures(
    store: SubjectStore,
    planned: Sequence[PlannedEvaluation],
    resources: Resources,
    display: Display,
    workers: int | None = None,
) -> dict[str, str]:
    """Draw what is missing of each version's pictures; gives the keys of sets that could not be, with the reasons."""
    sets = {one.pictures.key: one.pictures for one in planned}
    missing = {key: sorted(set(range(len(one.shards))) - one.present(store.root)) for key, one in sets.items()}
    count = {key: [len(indices) for _, indices in one.shards] for key, one in sets.items()}
    total = sum(one.count for one in sets.values())
    left = sum(count[key][shard] for key, shards in missing.items() for shard in shards)
    failures: dict[str, str] = {}
    with display.progress("pictures", total, "images", done=total - left) as line:
        rows = [
            {"set": key, "shards": part}
            for key, shards in missing.items()
            for part in _parts(shards, max(1, _PICTURES_A_ROW // sets[key].samplers[0].batch))
        ]
        # Out of memory, numbers that are not finite, a store that is away: each row has a second try, by a new worker.
        for _ in range(2):
            failures, failed = {}, []
            size = pool_size(resources, len(rows), workers)
            for row in (
                map_on_actors("pictures", rows, ImageSampler, (store.root.uri, sets), resources, size) if rows else ()
            ):
                one = sets[row["set"]]
                if row["failure"]:
                    failures.setdefault(one.key, row["failure"])
                    failed.append({"set": row["set"], "shards": list(row["shards"])})
                    continue
                drawn = sum(count[one.key][shard] for shard in row["shards"])
                line.advance(drawn, note=f"{one.subject}@{one.version}")
            rows = failed
    return failures


def _parts(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


class ImageSampler:
    """A Ray Data actor that draws and writes shards; it keeps the version that it drew last."""

    def __init__(self, store_uri: str, sets: Mapping[str, EvaluationSet]) -> None:
        """Load nothing until the first row says what is needed."""
        self._store, self._sets = SubjectStore(store_uri), sets
        self._loaded: tuple[str, VersionPipeline] | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Draw the row's shards; adds `failure`, why they could not all be, or ""."""
        one, failure = self._sets[row["set"]], ""
        try:
            present = one.present(self._store.root)
            for shard in (int(shard) for shard in row["shards"] if shard not in present):
                template, seeds = one.shards[shard][0], one.seeds(shard)
                pictures = self._model(one).draw([one.prompt(template)] * len(seeds), seeds)
                one.write_shard(self._store.root, shard, pictures)
        except (ArithmeticError, RuntimeError, OSError, ValueError) as error:
            traceback.print_exc()
            failure = f"{type(error).__name__}: {error}"
        return {**row, "failure": failure}

    def _model(self, one: EvaluationSet) -> VersionPipeline:
        if self._loaded is None or self._loaded[0] != one.key:
            self._loaded = None  # two pipelines may not fit side by side
            version = self._store.version(one.subject, one.version)
            assert version is not None
            self._loaded = (one.key, VersionPipeline.of_version(self._store, version, one.samplers))
        torch.set_num_threads(one.samplers[0].threads)  # it counts for the calling thread
        return self._loaded[1]


def score_versions(
    store: SubjectStore,
    planned: Sequence[PlannedEvaluation],
    judging: Judging,
    resources: Resources,
    display: Display,
    failures: Mapping[str, str],
    workers: int | None = None,
) -> list[Scored]:
    """Judge the pictures of each version, and write its scores; `failures` are those of sets that were not drawn."""
    found: dict[str, Scored] = {}
    with display.progress("scores", len(planned), "versions") as line:
        for part in _parts(planned, _VERSIONS_A_ROUND):
            waiting = {}
            for one in part:
                key, name = one.pictures.key, (one.version.subject, one.version.id)
                if key in failures:
                    found[key] = Scored(*name, {}, failures[key])
                    line.advance()
                    continue
                photos = one.photos()
                place = scores_location(store, one, judging, photos)
                if place.exists():
                    found[key] = Scored(*name, place.read_json())
                    line.advance()
                else:
                    waiting[key] = (one, photos, place)
            for key, failure in _judge(store, waiting, judging, resources, workers):
                one, _, place = waiting[key]
                record = {} if failure else place.read_json()
                found[key] = Scored(one.version.subject, one.version.id, record, failure)
                line.advance(note=f"{one.version.subject}@{one.version.id}")
    return [found[one.pictures.key] for one in planned]


def scores_location(store: SubjectStore, one: PlannedEvaluation, judging: Judging, photos: Subject) -> Location:
    """Where the scores of a version lie: beside its folder, named by all that determines them."""
    hashes = sorted(image.sha256 for image in photos.images)
    key = digest({"pictures": one.pictures.key, "judges": key_form(judging), "photos": hashes}, 16)
    return store.scores_location(one.version.subject, one.version.id) / f"{key}.json"


_Waiting = Mapping[str, tuple[PlannedEvaluation, Subject, Location]]


def _judge(
    store: SubjectStore, waiting: _Waiting, judging: Judging, resources: Resources, workers: int | None
) -> Iterator[tuple[str, str]]:
    """Score versions; yields the key of each set with what went wrong, or ""."""
    if not waiting:
        return
    rows = [{"set": key, "photos": [image.data for image in photos.images]} for key, (_, photos, _) in waiting.items()]
    plans = {key: (one, photos_record(one, photos), place) for key, (one, photos, place) in waiting.items()}
    size = pool_size(resources, len(rows), workers)
    for row in map_on_actors("scores", rows, Scorer, (store.root.uri, plans, judging), resources, size):
        yield row["set"], row["failure"]


def photos_record(one: PlannedEvaluation, photos: Subject) -> dict[str, Any]:
    """What the scores say of the photos."""
    given = {image.sha256 for image in photos.images}
    return {
        "photos": [{"name": image.name, "sha256": image.sha256} for image in photos.images],
        "photos_were_trained_on": bool(given & {image["sha256"] for image in one.version.manifest["instance_images"]}),
    }


class Scorer:
    """A Ray Data actor that scores the pictures of one version after another."""

    def __init__(
        self,
        store_uri: str,
        plans: Mapping[str, tuple[PlannedEvaluation, dict[str, Any], Location]],
        judging: Judging,
    ) -> None:
        """Load the judges."""
        self._root, self._plans, self._judging = SubjectStore(store_uri).root, plans, judging
        self._judges = judging.load("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Score the version of the row and write its record; gives `failure`, why it could not be, or ""."""
        one, of_photos, place = self._plans[row["set"]]
        failure = ""
        try:
            photos = [read_image(data, f"photo {number}") for number, data in enumerate(row["photos"])]
            record = score_record(one, photos, self._judging, self._judges, self._root)
            place.write_json(record | of_photos)
        except (ArithmeticError, RuntimeError, OSError, ValueError) as error:
            traceback.print_exc()
            failure = f"{type(error).__name__}: {error}"
        return {"set": row["set"], "failure": failure}


def score_record(
    one: PlannedEvaluation, photos: list[Any], judging: Judging, judges: Judges, root: Location
) -> dict[str, Any]:
    """Score a version whose pictures are in the store, and lay them out as a contact sheet beside them."""
    pictures = one.pictures.pictures(root)
    of_class = pictures.pop(None, [])
    noun, names = one.pictures.class_noun, judging.names()
    without_identifier = {fill(template or "", noun): drawn for template, drawn in pictures.items()}
    seen = judges.of_photos(photos)
    scores, by_prompt = judges.score(without_identifier, of_class, seen)

    rows = [Row("Photos", photos), Row(f"The class: {one.pictures.prompt(None)}", of_class[: 2 * len(photos)])]
    rows += [Row(one.pictures.prompt(template), drawn) for template, drawn in pictures.items()]
    columns = max(one.pictures.images_a_prompt, len(photos))
    sheet = contact_sheet(f"{one.pictures.subject}@{one.pictures.version}", rows, columns)
    (one.pictures.location(root) / "contact_sheet.png").write_bytes(png_bytes(sheet))
    return {
        "format": 1,
        "subject": one.pictures.subject,
        "version": one.pictures.version,
        "pictures": one.pictures.key,
        "protocol": {
            "judges": {"DINO, PRES": judges.dino.name, "CLIP-I, CLIP-T": judges.clip.name, "DIV": judges.distance},
            "prompts": len(one.pictures.templates),
            "images_a_prompt": one.pictures.images_a_prompt,
            "class_images": one.pictures.class_images,
            "seed": one.pictures.seed,
            "sampler": one.pictures.samplers[0].as_dict(),
        },
        "run": {"class_noun": noun, "training": one.version.manifest["run"]["training"]},
        "scores": _named(scores, names),
        "photos_with_each_other": _named(seen.scores, names),
        "by_prompt": {prompt: _named(values, names) for prompt, values in by_prompt.items()},
    }


def _named(scores: Mapping[str, float | None], names: Mapping[str, str]) -> dict[str, float]:
    """The scores that there are, under the names that their judges give them."""
    return {names[name]: round(value, 6) for name, value in scores.items() if value is not None}
