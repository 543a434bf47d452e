"""What ships beside the package: its limits, its papers, and whether it does what its card says, on few pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from dreambooth.embedded import backbone_path, subjects_path
from dreambooth.embedded.build.package import check_sizes
from dreambooth.embedded.vocabulary import CONTEXTS, HELD_OUT, NOUNS
from dreambooth.metrics.embedded import EmbeddedClip, EmbeddedDino
from dreambooth.subjects.class_noun import find_class_noun

WEIGHTS = backbone_path().parent


def test_the_weights_keep_their_limits_and_carry_their_papers() -> None:
    assert check_sizes(WEIGHTS) > 0
    assert {path.suffix for path in WEIGHTS.rglob("*") if path.is_file()} <= {".json", ".safetensors", ".md", ".txt"}
    card = (WEIGHTS / "README.md").read_text()
    assert "python -m dreambooth.embedded.build" in card
    assert f"unet {json.loads((WEIGHTS / 'training.json').read_text())['unet']}" in card
    assert "CC BY 4.0" in (WEIGHTS / "ATTRIBUTION.md").read_text()


@pytest.fixture(scope="module")
def clip() -> EmbeddedClip:
    return EmbeddedClip()


def test_samples_show_the_noun_and_the_place_that_the_prompt_names(clip: EmbeddedClip) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(backbone_path(), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    wanted = list(zip(["dog", "cat", "clock", "car", "pig", "cactus", "teapot", "penguin"], CONTEXTS, strict=False))
    prompts = [f"a {noun} {CONTEXTS[place]}" for noun, place in wanted]
    seeds = [torch.Generator().manual_seed(number) for number in range(len(prompts))]
    drawn = pipeline(prompts, height=64, width=64, num_inference_steps=25, guidance_scale=4.0, generator=seeds).images
    nouns, places = list(NOUNS), list(CONTEXTS)
    vectors = clip.embed_images(drawn)
    right = [0, 0]
    for vector, (noun, place) in zip(vectors, wanted, strict=True):
        by_noun = clip.embed_texts([f"a {other} {CONTEXTS[place]}" for other in nouns]) @ vector
        by_place = clip.embed_texts([f"a {noun} {CONTEXTS[other]}" for other in places]) @ vector
        right[0] += nouns[int(by_noun.argmax())] == noun
        right[1] += places[int(by_place.argmax())] == place
    assert right[0] >= 7
    assert right[1] >= 7


def _photos(name: str) -> list[Image.Image]:
    return [Image.open(path) for path in sorted((subjects_path() / name).glob("*.png"))]


def test_class_nouns_of_more_than_half_of_the_unseen_subjects_are_found(clip: EmbeddedClip) -> None:
    """The card says of how many."""
    found = {name: find_class_noun(clip, _photos(name), tuple(NOUNS), "a {}").noun for name in HELD_OUT}
    right = [name for name, (noun, _) in HELD_OUT.items() if found[name] == noun]
    assert len(right) > 0.55 * len(HELD_OUT), found


def test_individuals_are_told_from_others_of_their_class() -> None:
    dino = EmbeddedDino()
    vectors = {name: dino.embed_images(_photos(name)) for name in ("dog", "dog2", "dog3")}
    for name, own in vectors.items():
        among = (own @ own.T)[~torch.eye(len(own), dtype=torch.bool)].mean()
        assert all(among > (own @ other.T).mean() + 0.1 for key, other in vectors.items() if key != name)


def test_the_weights_are_listed_as_package_data() -> None:
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    assert '"weights/**/*"' in text
