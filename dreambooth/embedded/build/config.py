"""One config a stage, and the presets.

`full` is the recipe for a data-centre GPU; `cpu` has the same shapes on fewer and smaller steps, so that either takes
up the other's checkpoints; `tiny` goes through every stage in minutes.
"""

from dataclasses import dataclass, field, replace

from dreambooth.embedded.build.training import Recipe


@dataclass(frozen=True)
class PoolConfig:
    """How many scenes are rendered for whom; seeds differ, so judges never see the backbone's pictures."""

    size: int = 64
    backbone: int = 192_000
    held_out: int = 2_000
    clip: int = 256_000
    dino: int = 96_000


@dataclass(frozen=True)
class TokenizerConfig:
    """Tokens in all, the English words beside the captions, and the longest prompt."""

    tokens: int = 4_096
    english_words: int = 30_000
    length: int = 32


@dataclass(frozen=True)
class VaeConfig:
    """Widths of the autoencoder and its latent channels."""

    channels: tuple[int, ...] = (32, 64, 96)
    latent_channels: int = 8
    recipe: Recipe = field(default_factory=lambda: Recipe(steps=2_300, batch=128, lr=1e-3, ema=0.998))


@dataclass(frozen=True)
class TextConfig:
    """Widths and layers of the two text encoders, and of the image tower that they are trained against."""

    widths: tuple[int, int] = (128, 192)
    layers: tuple[int, int] = (3, 4)
    projection: int = 192
    tower: tuple[int, ...] = (32, 64, 128, 192)
    recipe: Recipe = field(
        default_factory=lambda: Recipe(steps=2_000, batch=256, lr=1e-3, weight_decay=0.05, ema=0.995)
    )


@dataclass(frozen=True)
class UnetConfig:
    """Widths, layers and attention of the U-Net."""

    channels: tuple[int, ...] = (96, 128, 192)
    layers: int = 1
    transformer_layers: tuple[int, ...] = (1, 1, 1)
    head_width: int = 32
    caption_drop: float = 0.1
    recipe: Recipe = field(default_factory=lambda: Recipe(steps=5_500, batch=512, lr=1.5e-3, ema=0.999, muon=True))


@dataclass(frozen=True)
class JudgeConfig:
    """Widths of the judges' towers."""

    tower: tuple[int, ...] = (32, 64, 112, 144)
    text_width: int = 128
    text_layers: int = 3
    projection: int = 128
    clip: Recipe = field(
        default_factory=lambda: Recipe(steps=2_200, batch=1024, lr=1.5e-3, weight_decay=0.05, ema=0.995, muon=True)
    )
    dino: Recipe = field(
        default_factory=lambda: Recipe(steps=3_000, batch=256, lr=1e-3, weight_decay=0.05, ema=0.995, muon=True)
    )


@dataclass(frozen=True)
class EvaluationConfig:
    """How much is measured: sampled pictures, held-out renders, and choices among `siblings` individuals."""

    samples: int = 1_000
    renders: int = 1_000
    trials: int = 500
    siblings: int = 10


@dataclass(frozen=True)
class PersonalizationConfig:
    """One DreamBooth preset for all held-out subjects, and how much of each is drawn."""

    subjects: int = 14
    steps: int = 400
    batch: int = 4
    lr: float = 1e-4
    prior_images: int = 64
    images_a_prompt: int = 2
    sampler_steps: int = 25
    guidance: float = 4.0


@dataclass(frozen=True)
class BuildConfig:
    """A whole build."""

    pool: PoolConfig = PoolConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    vae: VaeConfig = VaeConfig()
    text: TextConfig = TextConfig()
    unet: UnetConfig = UnetConfig()
    judges: JudgeConfig = JudgeConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    personalization: PersonalizationConfig = PersonalizationConfig()


def _few(steps: int, batch: int = 4) -> Recipe:
    return Recipe(steps=steps, batch=batch, lr=1e-3, warmup=2, ema=0.9, muon=True)


_FULL = BuildConfig()

PRESETS = {
    "full": _FULL,
    "cpu": replace(
        _FULL,
        pool=replace(_FULL.pool, backbone=48_000, clip=128_000, dino=20_000),
        vae=replace(_FULL.vae, recipe=Recipe(steps=1_700, batch=16, lr=1e-3, warmup=100, ema=0.998)),
        text=replace(_FULL.text, recipe=replace(_FULL.text.recipe, steps=1_000, batch=128)),
        unet=replace(
            _FULL.unet, recipe=replace(_FULL.unet.recipe, steps=5_700, batch=64, lr=1e-3, warmup=100, ema=0.998)
        ),
        judges=replace(
            _FULL.judges,
            clip=replace(_FULL.judges.clip, steps=9_000, batch=128, lr=1e-3),
            dino=replace(_FULL.judges.dino, steps=2_000, batch=64),
        ),
    ),
    "tiny": BuildConfig(
        PoolConfig(size=32, backbone=48, held_out=16, clip=32, dino=32),
        TokenizerConfig(tokens=600, english_words=300),
        VaeConfig(channels=(8, 16, 16), latent_channels=4, recipe=_few(6)),
        TextConfig(widths=(32, 32), layers=(2, 2), projection=32, tower=(8, 16, 16, 16), recipe=_few(4, 8)),
        UnetConfig(channels=(16, 32, 32), transformer_layers=(1, 1, 1), head_width=16, recipe=_few(6)),
        JudgeConfig(
            tower=(8, 16, 16, 16), text_width=32, text_layers=2, projection=32, clip=_few(4, 8), dino=_few(4, 8)
        ),
        EvaluationConfig(samples=4, renders=16, trials=2, siblings=2),
        PersonalizationConfig(subjects=1, steps=2, batch=2, prior_images=2, images_a_prompt=1, sampler_steps=2),
    ),
}
