"""A cascade in one run: its losses against the paper's equation in float64, and its version against plain diffusers."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import interpolate

from dreambooth.backbones import Backbone, LowResolution
from dreambooth.common.images import read_image
from dreambooth.common.streams import integer, normal, shuffled
from dreambooth.methods.dreambooth import Trainable
from dreambooth.runs import PlannedSubject, RunSpec
from dreambooth.sampling.sampler import to_pixels
from dreambooth.store import SubjectStore
from dreambooth.subjects.crops import centre_view
from pipelines.personalize import main
from pipelines.planning.options import parse
from pipelines.planning.plan import make_plan
from pipelines.stages.encode import TrainingSetEncoder
from pipelines.stages.priors import ClassPriorSampler
from pipelines.training.batches import Batches
from pipelines.training.train_step import step_loss
from pipelines.training.training_set import location_of
from tests.pipelines.test_personalize import changed, personalize, published_sample, redrawn

LEVEL = 120


def cascade(photos: Path, first: Path, second: Path, store: Path) -> list[str]:
    arguments = ["--images", photos, "--class-noun", "mug", "--backbone", first, "--super-resolution", second]
    return [str(argument) for argument in [*arguments, "--store", store, "--noise-level", LEVEL]]


# -- the plan ----------------------------------------------------------------------------------------------------------


def test_both_stages_are_planned(
    photos: Path, small_if: Path, small_if_super_resolution: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = cascade(photos, small_if, small_if_super_resolution, tmp_path)
    plan = make_plan(parse(arguments, ""))
    first, second = plan.subjects[0].run.cascade
    assert (first.training.resolution, first.prior is None) == (32, False)
    assert (first.prior.sampler.scheduler if first.prior else None) == "DDPMScheduler"
    assert (second.training.resolution, second.prior, second.training.prior_weight) == (64, None, 0)
    assert second.training.low_resolution == LowResolution(32, LEVEL)
    assert second.backbone == plan.backbones[1].hash != first.backbone
    assert [memory.parameters > 0 for memory in plan.memory] == [True, True]
    other = make_plan(parse(arguments[:-2], ""))  # without --noise-level: the paper's
    assert other.subjects[0].run.cascade[1].training.low_resolution == LowResolution(32, 0)
    assert other.subjects[0].run.version != first.version
    assert main([*arguments, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    [memory] = [line for line in lines if line.startswith("Memory per device")]
    assert memory.split()[-4:] == ["stage", "I", "stage", "II"]
    [resolution] = [line for line in lines if line.startswith("resolution ")]
    assert resolution.split()[1:4] == ["32", "/", "64"]


MISTAKES = {
    "stage II alone": (["--backbone", "{if_ii}"], "enlarges images and draws none"),
    "stage I in the place of stage II": (["--backbone", "{if_i}", "--super-resolution", "{if_i}"], "give stage II"),
    "stage II beside SDXL": (["--backbone", "{sdxl}", "--super-resolution", "{if_ii}"], "beside its stage I"),
    "a small image that is not small": (
        ["--backbone", "{if_i}", "--super-resolution", "{if_ii}", "--resolution", "64"],
        "draws 64 pixels a side, which does not enlarge --resolution 64",
    ),
    "a noise level that is none": (
        ["--backbone", "{if_i}", "--super-resolution", "{if_ii}", "--noise-level", "1000"],
        "--noise-level must be below 1000",
    ),
    "a noise level without a small image": (["--backbone", "{if_i}", "--noise-level", "3"], "--super-resolution too"),
    "an identifier that is lost": (["--backbone", "{if_i}", "--identifier", "Xqj"], "which cleans prompts"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_stages_that_do_not_fit_are_named(
    mistake: str, photos: Path, small_if: Path, small_if_super_resolution: Path, small_sdxl: Path, tmp_path: Path
) -> None:
    arguments, says = MISTAKES[mistake]
    folders = {"if_i": small_if, "if_ii": small_if_super_resolution, "sdxl": small_sdxl}
    named = [argument.format(**folders) for argument in arguments]
    common = ["--images", str(photos), "--class-noun", "mug", "--store", str(tmp_path / "store")]
    with pytest.raises(ValueError, match=re.escape(says)):
        make_plan(parse([*common, *named], ""))
    assert not (tmp_path / "store").exists()


# -- the losses --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(
    photos: Path, small_if: Path, small_if_super_resolution: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SubjectStore, PlannedSubject]:
    """A planned cascade, whose class-prior images and training sets are in the store."""
    place = tmp_path_factory.mktemp("cascade")
    arguments = cascade(photos, small_if, small_if_super_resolution, place)
    arguments += ["--prior-images", "4", "--prior-batch", "4", "--prior-steps", "2", "--batch", "2", "--workers", "1"]
    plan = make_plan(parse(arguments, ""))
    [planned] = plan.subjects
    prior = planned.run.prior
    assert prior is not None
    for backbone in plan.backbones:
        plan.store.add_backbone(backbone)
    made = ClassPriorSampler(plan.store.root.uri, {prior.key: prior})({"set": prior.key, "shard": 0})
    assert made["failure"] == ""
    encoder = TrainingSetEncoder(plan.store.root.uri)
    for stage in planned.cascade:
        encoder({"planned": pickle.dumps(stage)})
    return plan.store, planned


class Engine(Trainable):
    """The module, called as DeepSpeed's engine is."""

    device = torch.device("cpu")


def alpha_sigma(t: int) -> tuple[float, float]:
    """IF's cosine schedule (Nichol and Dhariwal 2021, Eq. 17) by its formula."""
    steps = 1000
    f = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    alpha_squared = np.prod(1 - np.minimum(1 - f[1 : t + 2] / f[: t + 1], 0.999))
    return float(np.sqrt(alpha_squared)), float(np.sqrt(1 - alpha_squared))


def images_of(store: SubjectStore, planned: PlannedSubject, half: str) -> list[Tensor]:
    run = planned.run
    if half == "instance":
        frame = (run.training.resolution, run.training.resolution)
        photos = [image.pixels() for image in planned.subject.images]
        squares = [centre_view((photo.height, photo.width), frame).show(photo) for photo in photos]
    else:
        assert run.prior is not None
        rows = run.prior.rows(store.root, run.training.prior_images, ["png", "id"])
        squares = [read_image(row["png"], row["id"]) for row in rows]
    return [to_pixels([square]).double() for square in squares]


def errors_in_float64(store: SubjectStore, planned: PlannedSubject, backbone: Backbone, step: int) -> Iterator[Any]:
    """(half, squared error) of each row of a step: ||epsilon - epsilon_hat(alpha_t x + sigma_t epsilon, c)||^2."""
    run = planned.run
    unet, t5 = backbone.load("unet").double(), backbone.load("text_encoder").double()
    for half, prompt in (("instance", run.instance_prompt), ("prior", run.class_prompt)):
        if half == "prior" and run.prior is None:
            continue
        base, images = (run.seed, run.subject, half), images_of(store, planned, half)
        text = backbone.text.tokenizers["tokenizer"](prompt, padding="max_length", max_length=77, return_tensors="pt")
        states = t5(text.input_ids, attention_mask=text.attention_mask).last_hidden_state
        for sample in range(run.training.batch):
            x = images[shuffled(step * run.training.batch + sample, len(images), *base, "order")]
            epsilon = normal(x.shape[1:], *base, "epsilon", step, sample).double()
            t = integer(1000, *base, "t", step, sample)
            alpha, sigma = alpha_sigma(t)
            z_t, more = alpha * x + sigma * epsilon, {}
            if run.training.low_resolution is not None:
                small = interpolate(x, (32, 32), mode="bicubic", antialias=True).clamp(-1, 1)
                alpha, sigma = alpha_sigma(LEVEL)
                noise = normal(x.shape[1:], *base, "augmentation", step, sample).double()
                upscaled = interpolate(small, (64, 64), mode="bilinear", align_corners=True)
                z_t = torch.cat([z_t, alpha * upscaled + sigma * noise], dim=1)
                more = {"class_labels": torch.tensor([LEVEL])}
            said = unet(z_t, torch.tensor([t]), encoder_hidden_states=states, **more).sample
            yield half, (said[:, :3] - epsilon).square().mean().item()


@pytest.mark.parametrize("number", [0, 1], ids=["stage I", "stage II"])
def test_both_terms_equal_the_papers_equation_in_float64(
    prepared: tuple[SubjectStore, PlannedSubject], number: int
) -> None:
    store, planned = prepared
    stage = planned.cascade[number]
    run: RunSpec = stage.run
    backbone = store.open_backbone(run.backbone)
    path = location_of(store, run).local
    assert path is not None
    batches = Batches(run, backbone, path)
    engine = Engine(backbone, {"unet": backbone.load("unet")})
    for step in (0, 7):
        with torch.no_grad():
            loss = step_loss(engine, run, backbone, batches.rows(step, range(run.training.batch)))
            errors = list(errors_in_float64(store, stage, backbone, step))
        terms = {half: [error for other, error in errors if other == half] for half, _ in errors}
        assert terms.keys() == ({"instance", "prior"} if number == 0 else {"instance"})
        assert loss.instance.item() == pytest.approx(np.mean(terms["instance"]), rel=1e-4)
        if loss.prior is not None:
            assert loss.prior.item() == pytest.approx(np.mean(terms["prior"]), rel=1e-4)
        assert (loss.prior is None) is ("prior" not in terms)


# -- the whole of it ---------------------------------------------------------------------------------------------------


def load_trained(backbone: Path, version: Path, components: list[str]) -> Any:
    """diffusers' pipeline of the backbone with the parts of a version, by nothing but diffusers and transformers."""
    kinds = {"unet": diffusers.UNet2DConditionModel, "scheduler": diffusers.DDPMScheduler}
    kinds["text_encoder"] = transformers.T5EncoderModel
    parts = {name: kinds[name].from_pretrained(version / name) for name in components}
    return diffusers.DiffusionPipeline.from_pretrained(backbone, **parts)


@pytest.mark.slow
def test_a_cascade_becomes_one_version_that_diffusers_chained_pipelines_load(
    photos: Path, small_if: Path, small_if_super_resolution: Path, small_upscaler: Path, tmp_path: Path
) -> None:
    arguments = cascade(photos, small_if, small_if_super_resolution, tmp_path)
    done = personalize(*arguments, "--learning-rate", "1e-4", "--upscaler", str(small_upscaler))
    assert done.returncode == 0, done.stdout + done.stderr
    [version] = SubjectStore(tmp_path).versions("mug")
    folder, second = version.location.local, version.manifest["super_resolution"]
    assert folder is not None
    assert version.components == second["components"] == ["scheduler", "unet"]
    assert all(changed(small_if, version, "unet"))
    pipelines = [
        load_trained(small_if, folder, version.components),
        load_trained(small_if_super_resolution, folder / "super_resolution", second["components"]),
    ]
    assert [pipeline.scheduler.config.variance_type for pipeline in pipelines] == ["fixed_small"] * 2
    base = diffusers.UNet2DConditionModel.from_pretrained(small_if_super_resolution, subfolder="unet")
    for before, after in zip(base.parameters(), pipelines[1].unet.parameters(), strict=True):
        assert not torch.equal(before, after)
    upscaler = diffusers.StableDiffusionUpscalePipeline.from_pretrained(small_upscaler)
    run = version.manifest["run"]
    torch.set_num_threads(1)
    for number in (0, 3):
        record, image = version.manifest["samples"][number], {}
        for pipeline, settings in zip(pipelines, (run["samples"], run["super_resolution"]["samples"]), strict=True):
            drawn = pipeline(
                prompt=record["prompt"],
                num_inference_steps=settings["steps"],
                guidance_scale=settings["guidance"],
                generator=torch.Generator().manual_seed(record["seed"]),
                **image,
            ).images
            image = {"image": drawn, "noise_level": LEVEL}
        assert drawn[0].size == (64, 64)
        settings = run["upscaling"]["samples"]
        enlarged = upscaler(
            prompt=record["prompt"].replace(version.manifest["phrase"], "mug"),
            image=drawn,
            num_inference_steps=settings["steps"],
            guidance_scale=settings["guidance"],
            noise_level=100,
            generator=torch.Generator().manual_seed(record["seed"]),
        ).images
        assert enlarged[0].size == (256, 256)
        assert np.array_equal(np.asarray(enlarged[0]), published_sample(version, number))
        assert np.array_equal(redrawn(version, number), np.asarray(drawn[0]))
    assert version.manifest["upscaler"]["backbone"]["hash"] == run["upscaling"]["backbone"]
