"""The model card, written from what was measured."""

from dreambooth.embedded.build.config import BuildConfig
from dreambooth.embedded.build.sprites import SETS
from dreambooth.embedded.vocabulary import ACCESSORIES, COLOURS, CONTEXTS, HELD_OUT, NOUNS, PROPERTIES

_ROWS = {
    "psnr_db": "Reconstruction of held-out scenes by the autoencoder, PSNR in dB",
    "clip_retrieval_of_100": "`embedded-clip`: own caption first among 100, held-out renders",
    "class_nouns_found": "... share of the held-out subjects whose class noun it finds among all",
    "dino_instance_of_10": "`embedded-dino`: right individual among 10 of its class, new scenes",
    "sampled_noun": "Samples of held-out captions with the right noun, by `embedded-clip`",
    "sampled_context": "... with the right context",
    "sampled_colour": "... with the right colour",
    "real_noun": "Real renders of the same captions with the right noun",
    "real_context": "... with the right context",
    "real_colour": "... with the right colour",
    "personal_real": "Held-out subjects, `embedded-dino`: their photos with each other",
    "personal_prior": "... images of the class with the photos",
    "personal_subject": "... personalized samples in new scenes with the photos",
    "personal_gain": "... how far from the class (0) to the photos (1)",
    "personal_context": "... samples with the right context",
    "seconds_per_image_on_one_core": "Seconds an image on one CPU core, 25 steps with guidance",
}


def model_card(figures: dict[str, float], training: dict[str, int], config: BuildConfig, preset: str) -> str:
    """The card as Markdown: what it is, its data and licences, its training, its figures, its limits."""
    sets = "\n".join(f"- {s.title} ({s.author}), {s.licence}" for s in SETS)
    table = "\n".join(f"| {text} | {figures[name]:.3g} |" for name, text in _ROWS.items() if name in figures)
    steps = ", ".join(f"{name} {count}" for name, count in training.items())
    size = config.pool.size
    return f"""# The embedded backbone and its judges

A small text-to-image model of Stable Diffusion XL's architecture that loads with `StableDiffusionXLPipeline`, trained
from scratch on composed scenes of emoji drawings, {size} x {size} pixels; and two small encoders that score pictures of
this kind. It exists so that personalization, evaluation and serving can be shown and tested without a model hub or a
GPU.

## Data

Scenes are composed by `dreambooth.embedded.scenes`: {len(NOUNS)} class nouns, {len(CONTEXTS)} contexts,
{len(COLOURS)} colours, {len(PROPERTIES)} further properties and {len(ACCESSORIES)} accessories, in the words of
DreamBench's prompts. {config.pool.backbone} scenes for the backbone, {config.pool.clip} and {config.pool.dino} others
for the judges. A tenth of the combinations of a noun with a context or a colour are kept from the backbone, and the
drawings of {len(HELD_OUT)} held-out subjects from all of them. The drawings come from

{sets}

See ATTRIBUTION.md.

## Training

`python -m dreambooth.embedded.build --out DIR --preset {preset}` makes them from nothing, with one config a stage in
`dreambooth/embedded/build/config.py`; `--continue-from dreambooth/embedded/weights` trains the U-Net further.
Optimizer steps of these weights: {steps}. The text encoders are trained contrastively, then frozen; the U-Net predicts
v under a schedule with zero terminal signal-to-noise. Latents are normalized inside the autoencoder's weights, so
`scaling_factor` is 1.

## Figures

| | |
|---|---|
{table}

Samples: {figures.get("samples", 0):.0f}, {figures.get("steps", 0):.0f} steps, guidance {figures.get("guidance", 0):g};
{figures.get("personal_subjects", 0):.0f} held-out subjects personalized. A judge that errs on real renders bounds what
it can say of samples: read the sampled shares beside the real ones.

## Limits

It draws toy-like scenes of one subject and knows a few hundred words. The judges know the same world: their scores are
called `embedded-clip` and `embedded-dino`, and compare with no CLIP or DINO score. People appear as small emoji figures
in one background; the model is no source of facts about anyone.
"""
