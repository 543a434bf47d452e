"""The class noun by zero-shot classification, with a small CLIP of random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from dreambooth.metrics.clip import ClipJudge
from dreambooth.subjects.class_noun import NOUNS, find_class_noun


@pytest.fixture(scope="module")
def pictures(photos: Path) -> list[Image.Image]:
    return [Image.open(path) for path in sorted(photos.iterdir())]


def test_the_noun_is_the_one_of_clips_own_probabilities(small_clip: Path, pictures: list[Image.Image]) -> None:
    found = find_class_noun(ClipJudge(small_clip), pictures)
    model, processor = CLIPModel.from_pretrained(small_clip), CLIPProcessor.from_pretrained(small_clip)
    texts = [f"a photo of a {noun}" for noun in NOUNS]
    with torch.no_grad():
        inputs = processor(text=texts, images=pictures, return_tensors="pt", padding=True)
        each = model(**inputs).logits_per_image.softmax(-1)
    expected = each.mean(0)
    assert (each - expected).abs().max() > 1e-3 * expected.max()  # the photos do not all say the same
    order = expected.argsort(descending=True).tolist()
    assert [found.noun, *(noun for noun, _ in found.runners_up)] == [NOUNS[index] for index in order[:4]]
    assert found.score == pytest.approx(expected[order[0]].item(), rel=1e-5)
    assert found.score > found.runners_up[0][1]
    assert f"{found.noun!r} with score {found.score:.2f}" in str(found)
    assert found.judge == str(small_clip)


def test_the_nouns_are_distinct_and_hold_those_of_dreambench() -> None:
    assert len(set(NOUNS)) == len(NOUNS)
    assert {"backpack", "stuffed animal", "glasses", "teapot", "vase"} <= set(NOUNS)
