import json
import shutil
import socket
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from transformers import CLIPTokenizer

from dreambooth.embedded.build.adopt import adopt
from dreambooth.embedded.build.config import PRESETS
from dreambooth.embedded.build.package import SHARD_BYTES, TOTAL_BYTES, check_sizes
from dreambooth.embedded.build.pool import for_pretraining, make_pool, pairs, read_pool
from dreambooth.embedded.build.stages import Build, run_package, run_unet
from dreambooth.embedded.build.training import Clock, OutOfTimeError, checkpoint_step, load_average
from dreambooth.embedded.build.vae import finished_vae, new_vae, psnr
from dreambooth.embedded.scenes import Sprites, render
from dreambooth.metrics.embedded import EmbeddedClip, EmbeddedDino
from tests.dreambooth.embedded.drawings import draw_sprites

CONFIG = PRESETS["tiny"]


def _command(out, sprites, *more):
    command = [sys.executable, "-m", "dreambooth.embedded.build", "--out", str(out), "--preset", "tiny"]
    return [*command, "--device", "cpu", "--workers", "1", "--sprites", str(sprites), *more]


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    return draw_sprites(tmp_path_factory.mktemp("sprites"))


@pytest.fixture(scope="module")
def built(tmp_path_factory, sprites):
    """All stages from nothing, by the command that ships the real thing; the first call runs out of time at once."""
    out = tmp_path_factory.mktemp("build")
    first = subprocess.run(_command(out, sprites, "--minutes", "0"), check=False, capture_output=True, text=True)
    assert first.returncode == 75, first.stderr
    assert "run the same command again" in first.stdout
    subprocess.run(_command(out, sprites), check=True)
    return out


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def test_the_backbone_loads_without_network_and_samples(built, no_network):
    pipeline = StableDiffusionXLPipeline.from_pretrained(built / "weights" / "backbone")
    pipeline.set_progress_bar_config(disable=True)
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    assert {parameter.dtype for part in parts for parameter in part.parameters()} == {torch.float32}
    picture = pipeline("a dog", height=32, width=32, num_inference_steps=2, output_type="np").images
    assert picture.shape == (1, 32, 32, 3)
    assert np.isfinite(picture).all()


def test_the_package_keeps_its_limits(built):
    assert 0 < check_sizes(built / "weights") <= TOTAL_BYTES
    weights = list((built / "weights").rglob("*.safetensors"))
    assert weights
    assert max(path.stat().st_size for path in weights) <= SHARD_BYTES
    assert not [p for p in (built / "weights").rglob("*") if p.suffix in (".bin", ".pt", ".pkl", ".ckpt")]


def test_attribution_ships_with_the_weights(built):
    text = (built / "weights" / "ATTRIBUTION.md").read_text()
    for words in ("Fluent Emoji", "Noto Emoji", "Firefox OS Emoji", "Twemoji", "MIT", "Apache-2.0", "CC BY 4.0"):
        assert words in text


def test_many_tokens_never_appear_in_a_caption(built):
    tokenizer = CLIPTokenizer.from_pretrained(built / "tokenizer")
    pool = read_pool(built / "pools" / "backbone", CONFIG.pool.backbone, CONFIG.pool.size)
    used = {token for caption in pool.captions for token in tokenizer(caption).input_ids}
    assert len(tokenizer) == CONFIG.tokenizer.tokens
    assert len(used) < len(tokenizer) / 2
    unused = [token for token in range(len(tokenizer)) if token not in used]
    survivors = [t for t in unused if tokenizer(tokenizer.decode([t])).input_ids[1:-1] == [t]]
    assert len(survivors) > 50


def test_captions_survive_the_tokenizer(built):
    tokenizer = CLIPTokenizer.from_pretrained(built / "tokenizer")
    text = "a dog wearing a black top hat and a monocle"
    ids = tokenizer(text, padding="max_length").input_ids
    assert len(ids) == CONFIG.tokenizer.length
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
    assert max(ids) == tokenizer.eos_token_id == tokenizer.pad_token_id


def test_latents_are_normalized_and_the_fold_changes_no_picture(built):
    pool = read_pool(built / "pools" / "backbone", CONFIG.pool.backbone, CONFIG.pool.size)
    config = CONFIG.vae
    cpu = torch.device("cpu")
    folded = finished_vae(new_vae(config.channels, config.latent_channels, 32), pool, built / "vae", cpu)
    pixels = torch.from_numpy(np.array(pool.images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = folded.encode(pixels).latent_dist.mean
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(config.latent_channels), atol=1e-3)
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(config.latent_channels), atol=1e-3)
    assert folded.config.scaling_factor == 1.0
    plain = new_vae(config.channels, config.latent_channels, 32)
    load_average(built / "vae", plain)
    assert psnr(folded, pool.images, cpu) == pytest.approx(psnr(plain, pool.images, cpu), abs=1e-3)


def test_an_interrupted_pool_goes_on_and_equals_one_made_at_once(sprites, tmp_path, monkeypatch):
    monkeypatch.setattr("dreambooth.embedded.build.pool.CHUNK", 3)

    def make(name, deadline):
        clock = Clock(deadline, torch.device("cpu"))
        return make_pool(sprites, tmp_path / name, for_pretraining, 9, 8, 1, 16, clock)

    with pytest.raises(OutOfTimeError, match="1 of 3"):
        make("pieces", deadline=0)
    with pytest.raises(OutOfTimeError, match="1 of 2"):
        make("pieces", deadline=0)
    pieces, whole = make("pieces", deadline=0), make("whole", deadline=float("inf"))
    assert np.array_equal(pieces.images, whole.images)
    assert pieces.captions == whole.captions
    assert len(whole.captions) == 8


def test_pairs_show_one_individual_in_two_scenes(sprites):
    drawings = Sprites.load(sprites)
    for index in range(0, 20, 2):
        one, two = pairs(drawings, 3, index), pairs(drawings, 3, index + 1)
        assert one.instance == two.instance
        assert not np.array_equal(render(one, drawings, 32), render(two, drawings, 32))
    assert pairs(drawings, 3, 0).instance != pairs(drawings, 3, 2).instance


def test_the_figures_are_written(built):
    figures = json.loads((built / "evaluation" / "figures.json").read_text())
    for name in ("psnr_db", "clip_retrieval_of_100", "dino_instance_of_10", "sampled_noun", "real_noun"):
        assert np.isfinite(figures[name])
    assert figures["samples"] == CONFIG.evaluation.samples
    assert Image.open(built / "evaluation" / "samples.png").width > 0
    assert 0 <= figures["personal_context"] <= 1
    sheets = [path.stem for path in (built / "evaluation").glob("*.png")]
    assert len(sheets) == 2 + CONFIG.personalization.subjects


def test_the_model_card_states_the_measured_figures_and_the_steps_trained(built):
    figures = json.loads((built / "evaluation" / "figures.json").read_text())
    text = (built / "weights" / "README.md").read_text()
    assert f"| {figures['psnr_db']:.3g} |" in text
    assert f"unet {CONFIG.unet.recipe.steps}" in text
    assert "Twemoji" in text


def test_packaging_again_gives_the_same_weights(built, sprites):
    before = {p: p.read_bytes() for p in (built / "weights").rglob("*.safetensors")}
    run_package(Build(built, CONFIG, Clock(float("inf"), torch.device("cpu")), given_sprites=sprites))
    assert before == {p: p.read_bytes() for p in (built / "weights").rglob("*.safetensors")}


def test_the_judges_load_and_give_unit_vectors(built, no_network):
    clip = EmbeddedClip(built / "weights" / "judges" / "embedded-clip")
    dino = EmbeddedDino(built / "weights" / "judges" / "embedded-dino")
    pictures = [Image.new("RGB", (40, 60), colour) for colour in ("red", "green", "blue")]
    for vectors in (clip.embed_images(pictures), dino.embed_images(pictures), clip.embed_texts(["a dog", "a red cat"])):
        assert torch.allclose(vectors.norm(dim=-1), torch.ones(len(vectors)), atol=1e-5)
    # fp16 weights of a small tower: the batch a picture comes in does not matter.
    assert torch.allclose(dino.embed_images(pictures)[1], dino.embed_images(pictures[1:2])[0], atol=1e-5)


def test_shipped_weights_can_be_trained_further(built, sprites, tmp_path):
    adopt(built / "weights", CONFIG, tmp_path)
    for part in ("vae", "text", "judge-clip", "judge-dino"):
        assert checkpoint_step(tmp_path / part) == checkpoint_step(built / part) > 0
    assert checkpoint_step(tmp_path / "unet") == 0

    shutil.copytree(built / "pools", tmp_path / "pools")
    build = Build(tmp_path, CONFIG, Clock(float("inf"), torch.device("cpu")), given_sprites=sprites)
    run_package(build)
    for path in (built / "weights").rglob("*.safetensors"):
        name = path.relative_to(built / "weights")
        if "vae" not in name.parts:  # its latents are normalized once more, by what half precision left of a scale
            assert (tmp_path / "weights" / name).read_bytes() == path.read_bytes(), name
    run_unet(build)
    run_package(build)
    training = [json.loads((folder / "weights" / "training.json").read_text()) for folder in (built, tmp_path)]
    assert training[1]["unet"] == training[0]["unet"] + CONFIG.unet.recipe.steps
    unet = "weights/backbone/unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / unet).read_bytes() != (built / unet).read_bytes()


def test_weights_of_another_shape_are_refused(built, tmp_path):
    with pytest.raises(ValueError, match="other shapes"):
        adopt(built / "weights", replace(CONFIG, judges=PRESETS["full"].judges), tmp_path)
    with pytest.raises(ValueError, match=r"holds no embedded backbone"):
        adopt(tmp_path / "nothing", CONFIG, tmp_path)
