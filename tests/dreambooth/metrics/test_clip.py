"""The CLIP judge, with a small CLIP of random weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from dreambooth.metrics.clip import ClipJudge


def test_embeddings_are_unit_vectors_of_one_space_and_do_not_depend_on_their_neighbours(
    small_clip: Path, photos: Path
) -> None:
    judge = ClipJudge(small_clip)
    pictures = [Image.open(path) for path in sorted(photos.iterdir())]
    images, texts = judge.embed_images(pictures), judge.embed_texts(["a dog", "a photo of a stuffed animal"])
    assert images.shape[1] == texts.shape[1]
    for vectors in (images, texts):
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(vectors)))
    torch.testing.assert_close(judge.embed_images(pictures[1:2])[0], images[1])
    torch.testing.assert_close(judge.embed_texts(["a dog"])[0], texts[0])
    assert judge.preprocess(pictures).shape == (3, 3, 32, 32)


def test_a_judge_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        ClipJudge(tmp_path / "nowhere")


def test_pickled_weights_are_not_read(small_clip: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small_clip, tmp_path / "pickled"))
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        ClipJudge(folder)
