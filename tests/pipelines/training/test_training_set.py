"""Captions, views, buckets and the teacher: what a training set holds, and the losses over it in float64."""

from __future__ import annotations

import pickle
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dreambooth.backbones import Backbone
from dreambooth.common.images import read_image
from dreambooth.common.streams import integer, normal, shuffled, turn
from dreambooth.methods.dreambooth import Trainable
from dreambooth.methods.teacher import Teacher
from dreambooth.runs import PlannedSubject, RunSpec
from dreambooth.sampling.sampler import to_pixels
from dreambooth.store import SubjectStore
from dreambooth.subjects.crops import View, views
from pipelines.personalize import main
from pipelines.planning.options import parse
from pipelines.planning.plan import Plan, make_plan
from pipelines.stages.encode import TrainingSetEncoder
from pipelines.stages.priors import ClassPriorSampler
from pipelines.training.batches import Batches
from pipelines.training.train_step import step_loss
from pipelines.training.training_set import location_of

CAPTIONS = ("a {subject} on a table", "a photo of a {subject}", "a {subject} on a table", "two cups and a {subject}")
FRAMES = ("32x32", "40x24", "24x40", "40x24")
"""Of the photos below, on the small SDXL."""

ALL = ("--captions", "--flip", "--random-crop", "--buckets", "--prior-kind", "teacher")


@pytest.fixture(scope="module")
def captioned(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four photos of three shapes, with captions of which two are the same."""
    folder = Path(shutil.copytree(photos, tmp_path_factory.mktemp("captioned") / "mug"))
    Image.open(folder / "1.png").rotate(180).crop((0, 0, 70, 120)).save(folder / "3.png")
    for number, caption in enumerate(CAPTIONS):
        (folder / f"{number}.txt").write_text(caption)
    return folder


def plan_of(captioned: Path, backbone: Path, store: Path, *more: str) -> Plan:
    arguments = ["--images", str(captioned), "--class-noun", "mug", "--backbone", str(backbone), "--store", str(store)]
    arguments += ["--prior-images", "4", "--prior-batch", "4", "--prior-steps", "2", "--batch", "2", "--workers", "1"]
    return make_plan(parse([*arguments, *more], ""))


Prepare = Callable[..., tuple[SubjectStore, PlannedSubject]]


@pytest.fixture(scope="module")
def prepare(captioned: Path, small_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepare:
    """Plans a run with some options, and makes its class-prior images and training set."""
    place = tmp_path_factory.mktemp("store")

    def prepare(*more: str) -> tuple[SubjectStore, PlannedSubject]:
        plan = plan_of(captioned, small_sdxl, place, *more)
        [planned] = plan.subjects
        plan.store.add_backbone(plan.backbone)
        prior = planned.run.prior
        assert prior is not None
        if not prior.has_shard(plan.store.root, 0):
            sampler = ClassPriorSampler(plan.store.root.uri, {prior.key: prior})
            assert sampler({"set": prior.key, "shard": 0})["failure"] == ""
        TrainingSetEncoder(plan.store.root.uri)({"planned": pickle.dumps(planned)})
        return plan.store, planned

    return prepare


def tensors_of(store: SubjectStore, run: RunSpec) -> dict[str, Tensor]:
    path = location_of(store, run).local
    assert path is not None
    return load_file(path)


def open_batches(store: SubjectStore, run: RunSpec) -> Batches:
    path = location_of(store, run).local
    assert path is not None
    return Batches(run, store.open_backbone(run.backbone), path)


def photos_by_frame(planned: PlannedSubject) -> dict[str, list[int]]:
    """The photos in each frame, in the order in which a training set has them."""
    return {bucket: [n for n, other in enumerate(FRAMES) if other == bucket] for bucket in sorted(set(FRAMES))}


# -- captions ----------------------------------------------------------------------------------------------------------


def test_each_photo_is_conditioned_on_its_own_caption_and_each_distinct_prompt_is_encoded_once(
    prepare: Prepare,
) -> None:
    store, planned = prepare("--captions")
    run, backbone = planned.run, store.open_backbone(planned.run.backbone)
    named = f"{run.identifier} mug"
    prompts = [caption.replace("{subject}", named) for caption in CAPTIONS]
    assert list(run.captions) == prompts
    tensors = tensors_of(store, run)
    encoders = {name: backbone.load(name) for name in backbone.text_encoders}
    for half, labels in (("instance", prompts), ("prior", ["a mug"] * 4)):
        rows = tensors[f"{half}.32x32.prompt"].flatten()
        with torch.no_grad():
            expected = backbone.text.encode(encoders, backbone.text.tokenize(labels))
        for name, value in expected.items():
            assert len(tensors[f"text.{name}"]) == 4  # three captions and the class prompt
            torch.testing.assert_close(tensors[f"text.{name}"][rows], value, rtol=1e-4, atol=1e-5)
    # And so are the rows of a step.
    [instance, prior] = open_batches(store, run).rows(3, range(2))
    base = (run.seed, run.subject, "instance")
    drawn = [prompts[shuffled(3 * 2 + sample, 4, *base, "order")] for sample in range(2)]
    for half, labels in ((instance, drawn), (prior, ["a mug"] * 2)):
        with torch.no_grad():
            expected = backbone.text.encode(encoders, backbone.text.tokenize(labels))
        for name, value in expected.items():
            torch.testing.assert_close(half.conditioning[name], value, rtol=1e-4, atol=1e-5)
    assert instance.ids == {}


def test_trained_text_encoders_get_the_token_ids_of_the_captions(prepare: Prepare) -> None:
    store, planned = prepare("--captions", "--train-text-encoder")
    run, backbone = planned.run, store.open_backbone(planned.run.backbone)
    [instance, prior] = open_batches(store, run).rows(5, range(2))
    base = (run.seed, run.subject, "instance")
    drawn = [run.captions[shuffled(5 * 2 + sample, 4, *base, "order")] for sample in range(2)]
    for half, labels in ((instance, drawn), (prior, ["a mug"] * 2)):
        for name, ids in backbone.text.tokenize(labels).items():
            assert torch.equal(half.ids[name], ids)
        assert half.conditioning.keys() == {"time_ids"}


# -- views and buckets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [("--flip",), ("--random-crop",), ALL[1:4]], ids=" ".join)
def test_latents_and_conditioning_of_a_view_agree_as_in_diffusers_training(
    prepare: Prepare, options: tuple[str, ...]
) -> None:
    store, planned = prepare(*options)
    training = planned.run.training
    tensors = tensors_of(store, planned.run)
    vae = store.open_backbone(planned.run.backbone).load("vae")
    frames = photos_by_frame(planned) if training.frames else {"32x32": [0, 1, 2, 3]}
    assert {name.split(".")[1] for name in tensors if name.startswith("instance")} == set(frames)
    corners = set()
    for bucket, photos in frames.items():
        target = [int(side) for side in bucket.split("x")]
        for position, number in enumerate(photos):
            photo = planned.subject.images[number].pixels()
            for view in range(training.views):
                told = tensors[f"instance.{bucket}.time_ids"][position, view].int().tolist()
                assert told[:2] == [photo.height, photo.width]
                assert told[4:] == target
                # diffusers' script: resize the photo whole, flip it, crop at the corner that the U-Net is told.
                scale = max(target[0] / photo.height, target[1] / photo.width)
                scaled = photo.resize(
                    (round(photo.width * scale), round(photo.height * scale)), Image.Resampling.LANCZOS
                )
                seen = ImageOps.mirror(scaled) if training.flip and view % 2 else scaled
                top, left = told[2:4]
                assert top + target[0] <= seen.height
                assert left + target[1] <= seen.width
                cut = seen.crop((left, top, left + target[1], top + target[0]))
                with torch.no_grad():
                    mean = vae.encode(to_pixels([cut])).latent_dist.mean[0]
                    other = vae.encode(to_pixels([ImageOps.mirror(cut)])).latent_dist.mean[0]
                cached = tensors[f"instance.{bucket}.mean"][position, view]
                assert cached.shape == mean.shape == (4, target[0] // 4, target[1] // 4)
                # Resizing and cutting in one pass rounds differently; the mirrored picture is another one.
                assert (cached - mean).abs().max() < 0.2 * (other - mean).abs().max()
                corners.add((top, left))
    assert (len(corners) > 4) is training.random_crop


def test_without_options_a_photo_has_one_view_and_draws_are_those_of_its_order(prepare: Prepare) -> None:
    store, planned = prepare()
    run, tensors = planned.run, tensors_of(store, planned.run)
    assert tensors["instance.32x32.mean"].shape == (4, 1, 4, 8, 8)
    assert {len(value) for name, value in tensors.items() if name.startswith("text.")} == {2}
    for step in range(4):
        [instance, _] = open_batches(store, run).rows(step, range(2))
        order = [shuffled(step * 2 + sample, 4, run.seed, "mug", "instance", "order") for sample in range(2)]
        assert torch.equal(instance.conditioning["time_ids"], tensors["instance.32x32.time_ids"][order, 0])


def test_every_view_of_every_photo_is_shown_equally_often(prepare: Prepare, tmp_path: Path) -> None:
    store, planned = prepare("--flip", "--random-crop")
    tensors = tensors_of(store, planned.run)
    # Latents that tell which they are, without variance.
    numbers = torch.arange(4 * 8, dtype=torch.float32).view(4, 8, 1, 1, 1)
    tensors["instance.32x32.mean"] = numbers.expand(4, 8, 4, 8, 8).contiguous()
    tensors["instance.32x32.log_variance"].fill_(-torch.inf)
    save_file(tensors, tmp_path / "marked.safetensors")
    backbone = store.open_backbone(planned.run.backbone)
    batches = Batches(planned.run, backbone, tmp_path / "marked.safetensors")
    shown = torch.cat([batches.rows(step, range(2))[0].x[:, 0, 0, 0] for step in range(16)])
    shown = (shown / backbone.latents.scale(torch.ones(1))).round().int()
    assert sorted(shown.tolist()) == list(range(4 * 8))
    # Each pass over the photos shows each of them once, and not the same view of each.
    assert all(sorted((row // 8).tolist()) == [0, 1, 2, 3] for row in shown.view(8, 4))
    assert any(len(set((row % 8).tolist())) > 1 for row in shown.view(8, 4))


def test_a_steps_photos_share_a_frame_and_frames_come_as_often_as_their_photos(prepare: Prepare) -> None:
    store, planned = prepare("--buckets")
    batches = open_batches(store, planned.run)
    shapes: Counter[tuple[int, ...]] = Counter()
    for step in range(8):
        # Two ranks, which draw alone.
        ranks = [batches.rows(step, range(rank, rank + 1)) for rank in range(2)]
        assert len({tuple(instance.x.shape) for instance, _ in ranks}) == 1
        assert {tuple(prior.x.shape) for _, prior in ranks} == {(1, 4, 8, 8)}
        whole = batches.rows(step, range(2))
        for half in range(2):
            assert torch.equal(torch.cat([rank[half].x for rank in ranks]), whole[half].x)
        shapes[tuple(whole[0].x.shape[2:])] += 1
    assert shapes == {(8, 8): 2, (10, 6): 4, (6, 10): 2}


# -- the losses --------------------------------------------------------------------------------------------------------


class Engine(Trainable):
    """The module, called as DeepSpeed's engine is; counts its passes."""

    device = torch.device("cpu")
    passes = 0

    def forward(self, *inputs: Any) -> Tensor:
        self.passes += 1
        return super().forward(*inputs)


def start(backbone: Backbone, run: RunSpec, moved: bool) -> Engine:
    """The networks that the run trains; `moved` takes them away from where they began."""
    engine = Engine(backbone, {name: backbone.load(name) for name in run.training.trained})
    if moved:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in engine.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return engine


def view_of(planned: PlannedSubject, step: int, sample: int) -> tuple[int, View]:
    """The photo and the view that a sample of a step draws, from the streams' keys."""
    run = planned.run
    base, groups = (run.seed, run.subject, "instance"), photos_by_frame(planned)
    chosen, visit = turn(step, [len(photos) for photos in groups.values()], *base, "frame")
    bucket, photos = list(groups.items())[chosen]
    position = visit * run.training.batch + sample
    place = shuffled(position, len(photos), *base, "order")
    view = shuffled(position // len(photos), 8, *base, "view", bucket, place)
    photo, key = planned.subject.images[photos[place]], (run.seed, run.subject, "view", photos[place])
    height, width = (int(side) for side in bucket.split("x"))
    made = views((photo.height, photo.width), (height, width), *key, count=8, flip=True, random_crop=True)
    return photos[place], made[view]


def errors_in_float64(
    store: SubjectStore, planned: PlannedSubject, engine: Engine, step: int
) -> Iterator[tuple[str, float]]:
    """(half, squared error) of each row: against epsilon for photos, against the base's prediction for class images."""
    run, backbone = planned.run, engine.backbone
    base_networks: dict[str, nn.Module] = {
        name: backbone.load(name).double() for name in ("unet", "vae", *backbone.text_encoders)
    }
    trained = {name: network.double() for name, network in engine.networks.items()}
    assert run.prior is not None
    priors = [read_image(row["png"], row["id"]) for row in run.prior.rows(store.root, 4, ["png", "id"])]
    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    for half in ("instance", "prior"):
        for sample in range(run.training.batch):
            key = (run.seed, run.subject, half)
            if half == "instance":
                photo, view = view_of(planned, step, sample)
                picture = view.show(planned.subject.images[photo].pixels())
                prompt = CAPTIONS[photo].replace("{subject}", f"{run.identifier} mug")
                sizes = [*view.original, *view.corner, *view.bucket]
            else:
                picture = priors[shuffled(step * run.training.batch + sample, 4, *key, "order")]
                prompt, sizes = "a mug", [32, 32, 0, 0, 32, 32]
            posterior = base_networks["vae"].encode(to_pixels([picture]).double()).latent_dist
            noise = normal(posterior.mean.shape[1:], *key, "latent", step, sample)
            x = 0.13025 * (posterior.mean + posterior.logvar.mul(0.5).exp() * noise)
            epsilon = normal(x.shape[1:], *key, "epsilon", step, sample).double()
            t = integer(1000, *key, "t", step, sample)
            z_t = alphas[t] ** 0.5 * x + (1 - alphas[t]) ** 0.5 * epsilon
            said = predict_in_float64(backbone, base_networks | trained, z_t, t, prompt, sizes)
            target = epsilon
            if half == "prior":
                target = predict_in_float64(backbone, base_networks, z_t, t, prompt, sizes)
            yield half, (said - target).square().mean().item()


def predict_in_float64(
    backbone: Backbone, networks: dict[str, nn.Module], z_t: Tensor, t: int, prompt: str, sizes: list[int]
) -> Tensor:
    states = []
    for number in ("", "_2"):
        tokenizer = backbone.text.tokenizers[f"tokenizer{number}"]
        ids = tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
        output = networks[f"text_encoder{number}"](ids, output_hidden_states=True)
        states.append(output.hidden_states[-2])
    return networks["unet"](
        z_t,
        torch.tensor([t]),
        encoder_hidden_states=torch.cat(states, -1),
        added_cond_kwargs={"text_embeds": output.text_embeds, "time_ids": torch.tensor([sizes], dtype=torch.float64)},
    ).sample


@pytest.mark.parametrize("more", [(), ("--train-text-encoder",)], ids=["frozen text", "trained text"])
def test_both_terms_equal_a_plain_recomputation_in_float64(prepare: Prepare, more: tuple[str, ...]) -> None:
    store, planned = prepare(*ALL, *more)
    run = planned.run
    backbone, batches = store.open_backbone(run.backbone), open_batches(store, run)
    teacher = Teacher(backbone, backbone.load("unet"))
    for step in (0, 1, 5):
        engine = start(backbone, run, moved=True)
        with torch.no_grad():
            loss = step_loss(engine, run, backbone, batches.rows(step, range(2)), teacher)
            errors = list(errors_in_float64(store, planned, engine, step))
        terms = {half: np.mean([error for other, error in errors if other == half]) for half, _ in errors}
        assert engine.passes == 2
        assert loss.prior is not None
        assert loss.prior.item() > 1e-4
        assert (loss.instance.item(), loss.prior.item()) == pytest.approx((terms["instance"], terms["prior"]), rel=1e-3)


@pytest.mark.parametrize("more", [(), ("--buckets",), ("--train-text-encoder",)], ids=["plain", "buckets", "text"])
def test_before_training_the_prior_term_against_the_teacher_is_zero(prepare: Prepare, more: tuple[str, ...]) -> None:
    store, planned = prepare("--prior-kind", "teacher", *more)
    run = planned.run
    backbone = store.open_backbone(run.backbone)
    teacher = Teacher(backbone, backbone.load("unet"))
    engine = start(backbone, run, moved=False)
    loss = step_loss(engine, run, backbone, open_batches(store, run).rows(0, range(2)), teacher)
    assert loss.prior is not None
    assert loss.prior.item() < 1e-10
    assert loss.instance.item() > 0.1
    assert engine.passes == (2 if run.training.frames else 1)


# -- the plan ----------------------------------------------------------------------------------------------------------


def test_each_option_makes_another_run_and_the_plan_tells_of_it(
    captioned: Path, small_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = [(), *((option,) for option in ALL[:4]), ALL[4:]]
    runs = [plan_of(captioned, small_sdxl, tmp_path, *more).subjects[0].run for more in changes]
    assert len({run.key for run in runs}) == len(changes)
    assert [run.training.views for run in runs] == [1, 1, 2, 8, 1, 1]
    arguments = ["--images", str(captioned), "--class-noun", "mug", "--backbone", str(small_sdxl), *ALL, "--dry-run"]
    assert main([*arguments, "--store", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert f"0.png: 'a {runs[0].identifier} mug on a table'" in told
    assert "1.png: 40 x 24 pixels of 40 x 25" in told
    alone, taught = (plan_of(captioned, small_sdxl, tmp_path, *more).memory[0].frozen for more in ((), ALL[4:]))
    assert alone == 0 < taught
