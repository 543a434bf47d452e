"""DINO's judge, with a small transformer of random weights, against transformers' own pieces."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor, ViTModel

from dreambooth.metrics import Judge
from dreambooth.metrics.crop import paper_crop
from dreambooth.metrics.dino import DinoJudge


def test_a_picture_is_the_class_token_of_its_centre(small_dino: Path, photos: Path) -> None:
    judge = DinoJudge(small_dino)
    pictures = [Image.open(path) for path in sorted(photos.iterdir())]
    # What `facebook/dino-vits16` ships beside its weights, but for the crop.
    processor = ViTImageProcessor(
        do_resize=False, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225], do_normalize=True
    )
    pixels = processor([paper_crop(picture, 32) for picture in pictures], return_tensors="pt").pixel_values
    torch.testing.assert_close(judge.preprocess(pictures), pixels)
    with torch.no_grad():
        tokens = ViTModel.from_pretrained(small_dino, add_pooling_layer=False).eval()(pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(judge.embed_images(pictures), tokens / tokens.norm(dim=-1, keepdim=True))
    assert isinstance(judge, Judge)


def test_a_judge_that_is_not_there_or_a_pickle_is_named(small_dino: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        DinoJudge(tmp_path / "nowhere")
    folder = Path(shutil.copytree(small_dino, tmp_path / "pickled"))
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        DinoJudge(folder)
