"""The paper's scores against their definitions, pair by pair, and their names."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dreambooth.metrics.scores import SCORES, Judges, Judging


class Colours:
    """A judge to whom a picture is its mean colour, and a text the colour that it names."""

    name = "colours"

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        return torch.stack([torch.from_numpy(np.asarray(image)).permute(2, 0, 1).float() for image in images])

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        vectors = self.preprocess(images).mean(dim=(2, 3))
        return vectors / vectors.norm(dim=-1, keepdim=True)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return torch.eye(3)[[["red", "green", "blue"].index(text.split()[1]) for text in texts]]


def distances(pictures: Sequence[Image.Image]) -> Tensor:
    means = torch.tensor([float(np.asarray(picture).mean()) for picture in pictures])
    return (means[:, None] - means).abs()


def pictures(count: int, seed: int) -> list[Image.Image]:
    draws = np.random.default_rng(seed)
    return [Image.fromarray(np.full((8, 8, 3), draws.integers(1, 256, 3), np.uint8)) for _ in range(count)]


def similarity(one: Image.Image, other: Image.Image) -> float:
    a, b = (np.asarray(picture)[0, 0].astype(float) for picture in (one, other))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_scores_are_means_over_the_pairs_that_the_paper_names() -> None:
    judges = Judges(Colours(), Colours(), distances, "difference")
    drawn = {"a red dog": pictures(4, 1), "a blue dog": pictures(4, 2)}
    of_class, photos = pictures(5, 3), pictures(3, 4)
    seen = judges.of_photos(photos)
    scores, by_prompt = judges.score(drawn, of_class, seen)

    everything = [picture for some in drawn.values() for picture in some]
    fidelity = np.mean([similarity(*pair) for pair in product(everything, photos)])
    prompt = np.mean([np.asarray(p)[0, 0, c] / np.linalg.norm(np.asarray(p)[0, 0].astype(float))
                      for some, c in zip(drawn.values(), (0, 2), strict=True) for p in some])  # fmt: skip
    spread = np.mean([abs(float(np.asarray(a).mean()) - float(np.asarray(b).mean()))
                      for some in drawn.values() for a, b in combinations(some, 2)])  # fmt: skip
    assert scores["DINO"] == pytest.approx(fidelity, rel=1e-5)
    assert scores["CLIP-I"] == pytest.approx(fidelity, rel=1e-5)
    assert scores["CLIP-T"] == pytest.approx(prompt, rel=1e-5)
    assert scores["PRES"] == pytest.approx(np.mean([similarity(*p) for p in product(of_class, photos)]), rel=1e-5)
    assert scores["DIV"] == pytest.approx(spread, rel=1e-5)
    assert list(by_prompt) == list(drawn)
    assert seen.scores["DINO"] == pytest.approx(np.mean([similarity(*p) for p in combinations(photos, 2)]), rel=1e-5)
    assert tuple(scores) == tuple(seen.scores) == SCORES


def test_what_cannot_be_scored_is_left_out() -> None:
    judges = Judges(Colours(), Colours(), None, "difference")
    seen = judges.of_photos(pictures(1, 1))
    scores, _ = judges.score({"a red dog": pictures(1, 2)}, [], seen)
    assert (scores["PRES"], scores["DIV"], seen.scores["DINO"]) == (None, None, None)


def test_the_papers_names_are_for_the_papers_encoders(small_dino: Path, small_clip: Path) -> None:
    assert list(Judging().names().values()) == list(SCORES)
    assert list(Judging("/models/dino-vits16", "/models/clip-vit-base-patch32").names().values()) == list(SCORES)
    other = Judging("facebook/dino-vits8", "openai/clip-vit-large-patch14").names()
    assert other["DINO"] == "DINO (dino-vits8)"
    assert other["PRES"] == "PRES (dino-vits8)"
    assert other["CLIP-T"] == "CLIP-T (clip-vit-large-patch14)"
    assert other["DIV"] == "DIV"
    assert Judging.embedded().names()["DINO"] == "embedded-dino"
    judges = Judging(str(small_dino), str(small_clip)).load()
    assert judges.distances is None
    assert judges.clip.preprocess([Image.new("RGB", (50, 90))]).shape == (1, 3, 32, 32)


def test_the_embedded_judges_score_diversity_by_dissimilarity() -> None:
    judges = Judging.embedded().load()
    assert judges.distances is not None
    same, other = pictures(2, 5)
    found = judges.distances([same, same, other])
    assert float(found[0, 1]) == pytest.approx(0, abs=1e-5)
    assert float(found[0, 2]) > 1e-3
