"""The stages of the build, in order; each reads what the ones before it left in the work folder."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dreambooth.embedded.build import (
    adopt,
    card,
    evaluate,
    judges,
    package,
    personalization,
    pool,
    sprites,
    subjects,
    text,
    tokenizer,
    unet,
    vae,
)
from dreambooth.embedded.build.config import BuildConfig
from dreambooth.embedded.build.training import Clock, checkpoint_step, load_average

BACKBONE_SEED, HELD_OUT_SEED, DINO_SEED, CLIP_SEED = 1, 2, 3, 4


@dataclass(frozen=True)
class Build:
    """The work folder and what the stages share."""

    out: Path
    config: BuildConfig
    clock: Clock
    workers: int = 2
    given_sprites: Path | None = None
    preset: str = "full"

    @property
    def sprites(self) -> Path:
        """The folder of rendered drawings."""
        return self.given_sprites or self.out / "sprites"

    @property
    def weights(self) -> Path:
        """What is shipped."""
        return self.out / "weights"

    @cached_property
    def backbone_pool(self) -> pool.Pool:
        """The scenes that the backbone learns from."""
        return self._pool("backbone", pool.for_pretraining, BACKBONE_SEED, self.config.pool.backbone)

    @cached_property
    def held_out_pool(self) -> pool.Pool:
        """Scenes of caption combinations that nobody learns from."""
        return self._pool("held-out", pool.held_out_captions, HELD_OUT_SEED, self.config.pool.held_out)

    @cached_property
    def clip_pool(self) -> pool.Pool:
        """The scenes that `embedded-clip` learns from."""
        return self._pool("judge-clip", pool.for_judging, CLIP_SEED, self.config.pool.clip)

    @cached_property
    def dino_pool(self) -> pool.Pool:
        """The scenes that `embedded-dino` learns from, two of each individual."""
        return self._pool("judge-dino", pool.pairs, DINO_SEED, self.config.pool.dino)

    def _pool(self, name: str, sampler: pool.Sampler, seed: int, count: int) -> pool.Pool:
        folder = self.out / "pools" / name
        return pool.make_pool(
            self.sprites, folder, sampler, seed, count, self.workers, self.config.pool.size, self.clock
        )

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        """The trained tokenizer."""
        return CLIPTokenizer.from_pretrained(self.out / "tokenizer")

    def trained_vae(self) -> AutoencoderKL:
        """The trained autoencoder with normalized latents."""
        return vae.finished_vae(self.new_vae(), self.backbone_pool, self.out / "vae", self.clock.device)

    def new_vae(self) -> AutoencoderKL:
        """An untrained autoencoder of the configured shape."""
        return vae.new_vae(self.config.vae.channels, self.config.vae.latent_channels, self.config.pool.size)

    def trained_encoders(self) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
        """The trained text encoders."""
        return text.finished_encoders(self.tokenizer, self.config.text, self.out / "text")

    def new_unet(self) -> unet.UNet2DConditionModel:
        """An untrained U-Net of the configured shape."""
        shrink = 2 ** (len(self.config.vae.channels) - 1)
        return unet.new_unet(
            self.config.unet,
            self.config.vae.latent_channels,
            self.config.pool.size // shrink,
            sum(self.config.text.widths),
            self.config.text.projection,
        )


def run_sprites(build: Build) -> None:
    """Fetch the emoji packages and render their drawings."""
    if build.given_sprites is None and not (build.out / "sprites" / "done").exists():
        sprites.make_sprites(sprites.install_packages(build.out / "npm"), build.sprites)
        (build.out / "sprites" / "done").touch()


def run_pools(build: Build) -> None:
    """Render the scenes."""
    for made in (build.backbone_pool, build.held_out_pool, build.clip_pool, build.dino_pool):
        print(f"{len(made.captions)} scenes, {len(set(made.captions))} captions", flush=True)


def run_tokenizer(build: Build) -> None:
    """Train the tokenizer."""
    if not (build.out / "tokenizer").exists():
        tokenizer.train_tokenizer(build.backbone_pool.captions, build.config.tokenizer, build.out / "tokenizer")


def run_vae(build: Build) -> None:
    """Train the autoencoder."""
    vae.train_vae(build.new_vae(), build.backbone_pool, build.config.vae.recipe, build.out / "vae", build.clock)


def run_text(build: Build) -> None:
    """Train the text encoders."""
    text.train_text(build.tokenizer, build.backbone_pool, build.config.text, build.out / "text", build.clock)


def run_unet(build: Build) -> None:
    """Cache latents and text states, then train the U-Net.

    The cache belongs to one autoencoder and one pair of encoders: training those further makes it anew, and the U-Net
    goes on from where it was on the new latents.
    """
    parents = f"vae-{checkpoint_step(build.out / 'vae')}-text-{checkpoint_step(build.out / 'text')}"
    data = unet.make_latents(
        build.backbone_pool,
        build.trained_vae(),
        build.tokenizer,
        build.trained_encoders(),
        build.out / "latents" / parents,
        build.clock,
    )
    unet.train_unet(build.new_unet(), data, build.config.unet, build.out / "unet", build.clock)


def run_judges(build: Build) -> None:
    """Train both judges."""
    config = build.config.judges
    judges.train_clip(build.tokenizer, build.clip_pool, config, build.out / "judge-clip", build.clock)
    judges.train_dino(build.dino_pool, config, build.out / "judge-dino", build.clock)


def run_package(build: Build) -> None:
    """Put everything that is shipped into `weights/`; what the U-Net has learned so far, if it is not done."""
    model = build.new_unet()
    steps = load_average(build.out / "unet", model)
    pipeline = package.assemble(
        build.trained_vae().cpu(), build.trained_encoders(), build.tokenizer, model, unet.new_scheduler()
    )
    package.save_backbone(pipeline, build.weights / "backbone")
    clip, dino = judges.finished_judges(
        build.tokenizer, build.config.judges, build.out / "judge-clip", build.out / "judge-dino"
    )
    judges.save_judges(clip, dino, build.tokenizer, build.config.pool.size, build.weights / "judges")
    package.load_as_float32(build.weights / "judges")
    (build.weights / "ATTRIBUTION.md").write_text(sprites.ATTRIBUTION)
    steps += adopt.steps_before(build.out)
    training = {name: checkpoint_step(build.out / name) for name in ("vae", "text", "judge-clip", "judge-dino")}
    (build.weights / "training.json").write_text(json.dumps(training | {"unet": steps}, indent=2) + "\n")
    print(f"{package.check_sizes(build.weights)} bytes in {build.weights}", flush=True)


def run_subjects(build: Build) -> None:
    """Render the held-out subjects."""
    subjects.write_subjects(build.sprites, build.out / "subjects")


def run_evaluate(build: Build) -> None:
    """Measure the package, write `evaluation/figures.json` and contact sheets, and the model card into the package."""
    figures = evaluate.evaluate(
        build.weights,
        build.sprites,
        build.held_out_pool,
        build.config.evaluation,
        build.out / "evaluation",
        build.clock.device,
    )
    figures |= personalization.personalize_all(
        build.weights, build.config.personalization, build.out / "evaluation", build.clock.device
    )
    (build.out / "evaluation" / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    training = json.loads((build.weights / "training.json").read_text())
    (build.weights / "README.md").write_text(card.model_card(figures, training, build.config, build.preset))


STAGES: dict[str, Callable[[Build], None]] = {
    "sprites": run_sprites,
    "pools": run_pools,
    "tokenizer": run_tokenizer,
    "vae": run_vae,
    "text": run_text,
    "judges": run_judges,
    "unet": run_unet,
    "package": run_package,
    "subjects": run_subjects,
    "evaluate": run_evaluate,
}
