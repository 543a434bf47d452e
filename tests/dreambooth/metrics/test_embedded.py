import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth.embedded.build.config import PRESETS
from dreambooth.embedded.build.judges import Individuals, new_clip, save_judges
from dreambooth.embedded.build.package import load_as_float32
from dreambooth.embedded.build.tokenizer import train_tokenizer
from dreambooth.metrics import Judge, TextJudge, load_judge
from dreambooth.metrics.embedded import EmbeddedClip, EmbeddedDino

CONFIG = PRESETS["tiny"]


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judges")
    tokenizer = train_tokenizer(["a dog on the beach"], CONFIG.tokenizer, folder / "tokenizer")
    torch.manual_seed(0)
    save_judges(new_clip(tokenizer, CONFIG.judges), Individuals(CONFIG.judges), tokenizer, 32, folder)
    load_as_float32(folder)
    return EmbeddedClip(folder / "embedded-clip"), EmbeddedDino(folder / "embedded-dino")


def _noise(seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def test_they_follow_the_protocol_and_carry_their_own_names(judges):
    clip, dino = judges
    assert isinstance(clip, TextJudge)
    assert isinstance(dino, Judge)
    assert not isinstance(dino, TextJudge)
    assert (clip.name, dino.name) == ("embedded-clip", "embedded-dino")


def test_pictures_become_square_pixels_between_minus_one_and_one(judges):
    _, dino = judges
    pixels = dino.preprocess([_noise(1, (50, 90)), Image.new("L", (20, 20), 255)])
    assert pixels.shape == (2, 3, 32, 32)
    assert pixels.min() >= -1
    assert pixels[1].unique().tolist() == [1.0]


def test_a_vector_does_not_depend_on_the_batch(judges):
    pictures = [_noise(seed) for seed in range(70)]
    for judge in judges:
        together = judge.embed_images(pictures)
        assert together.shape == (70, CONFIG.judges.projection)
        assert torch.allclose(together[69], judge.embed_images(pictures[69:])[0], atol=1e-5)


def test_the_chosen_text_is_the_one_with_the_highest_score(judges):
    clip, _ = judges
    texts = ["a dog", "a red dog", "a dog on the beach"]
    pictures = [_noise(seed) for seed in range(5)]
    scores = clip.embed_images(pictures) @ clip.embed_texts(texts).T
    assert clip.choose(pictures, texts) == scores.argmax(1).tolist()


def test_nothing_to_embed_is_an_error(judges):
    clip, dino = judges
    with pytest.raises(ValueError, match="no pictures"):
        dino.embed_images([])
    with pytest.raises(ValueError, match="no texts"):
        clip.embed_texts([])


def test_an_unknown_judge_or_missing_weights_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="embedded-clip, embedded-dino"):
        load_judge("dino")
    with pytest.raises(ValueError, match="build"):
        EmbeddedDino(tmp_path / "nowhere")
