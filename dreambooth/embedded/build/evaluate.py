"""Figures of what was built: reconstruction, judges, and whether samples show what their captions say.

Everything is measured on the packaged weights, loaded as a user loads them, and on scenes that no part was trained on.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from dreambooth.common.contact_sheet import Row, contact_sheet
from dreambooth.embedded import subjects_path
from dreambooth.embedded.build.config import EvaluationConfig
from dreambooth.embedded.build.pool import Pool
from dreambooth.embedded.build.vae import psnr
from dreambooth.embedded.instances import Instance
from dreambooth.embedded.scenes import Scene, Sprites, caption, render, sample_scene
from dreambooth.embedded.vocabulary import COLOURS, CONTEXTS, HELD_OUT, NOUNS
from dreambooth.metrics.embedded import EmbeddedClip, EmbeddedDino
from dreambooth.subjects.class_noun import find_class_noun

SCENE_SEED, GALLERY_SEED = 5, 6
STEPS, GUIDANCE = 25, 4.0


def evaluate(
    weights: Path, sprites: Path, held_out: Pool, config: EvaluationConfig, out: Path, device: torch.device
) -> dict[str, float]:
    """Measure everything, write `figures.json` and contact sheets into `out`, and return the figures."""
    out.mkdir(parents=True, exist_ok=True)
    drawings = Sprites.load(sprites)
    clip = EmbeddedClip(weights / "judges" / "embedded-clip", device)
    dino = EmbeddedDino(weights / "judges" / "embedded-dino", device)
    pipeline = StableDiffusionXLPipeline.from_pretrained(weights / "backbone", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    figures: dict[str, float] = {}

    def note(values: dict[str, float]) -> None:
        figures.update(values)
        print(json.dumps(values), flush=True)
        (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")

    note({"seconds_per_image_on_one_core": seconds_per_image(pipeline)})
    pipeline.to(device)
    note({"psnr_db": psnr(pipeline.vae, held_out.images[: config.renders], device)})
    note({"clip_retrieval_of_100": retrieval(clip, held_out, config.renders)})
    note({"dino_instance_of_10": instance_choice(dino, drawings, config.trials, config.siblings)})
    note({"class_nouns_found": class_nouns_found(clip)})
    scenes = [sample_scene(drawings, SCENE_SEED, index, held_out=True) for index in range(config.samples)]
    size = held_out.images.shape[1]
    real = [Image.fromarray(render(scene, drawings, size)) for scene in scenes]
    note({f"real_{name}": value for name, value in accuracies(clip, scenes, real).items()})
    sampled = sample(pipeline, [caption(scene) for scene in scenes])
    note({f"sampled_{name}": value for name, value in accuracies(clip, scenes, sampled).items()})
    note({"samples": len(scenes), "steps": STEPS, "guidance": GUIDANCE})
    shown = min(64, len(scenes))
    titles = [caption(scene) for scene in scenes[:shown]]
    for name, pictures in (("samples", sampled), ("renders", real)):
        row = Row("captions that training never combined", pictures[:shown], titles)
        contact_sheet(name, [row], columns=8).save(out / f"{name}.png")
    return figures


def sample(pipeline: StableDiffusionXLPipeline, prompts: Sequence[str], batch: int = 25) -> list[Image.Image]:
    """One picture a prompt, seeded by its number."""
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        seeds = [torch.Generator().manual_seed(start + offset) for offset in range(len(part))]
        result = pipeline(
            part, height=side, width=side, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=seeds
        )
        pictures += result.images
    return pictures


def accuracies(clip: EmbeddedClip, scenes: Sequence[Scene], pictures: Sequence[Image.Image]) -> dict[str, float]:
    """How often `embedded-clip` finds the right noun, context and colour, zero-shot: of all captions that differ in
    that one word, the true one must fit best."""
    vectors = clip.embed_images(pictures)
    right: dict[str, list[bool]] = {"noun": [], "context": [], "colour": []}
    for scene, vector in zip(scenes, vectors, strict=True):
        for kind, variants, truth in _variants(scene):
            scores = clip.embed_texts([caption(variant) for variant in variants]) @ vector
            right[kind].append(int(scores.argmax()) == truth)
    return {kind: float(np.mean(hits)) for kind, hits in right.items() if hits}


def _variants(scene: Scene) -> list[tuple[str, list[Scene], int]]:
    nouns, contexts, colours = list(NOUNS), list(CONTEXTS), list(COLOURS)
    who = scene.instance
    found = [("noun", [replace(scene, instance=replace(who, noun=noun)) for noun in nouns], nouns.index(who.noun))]
    if scene.context is not None and scene.says_context:
        swapped = [replace(scene, context=context) for context in contexts]
        found.append(("context", swapped, contexts.index(scene.context)))
    if scene.colour is not None:
        tinted = [replace(scene, colour=colour) for colour in colours]
        found.append(("colour", tinted, colours.index(scene.colour)))
    return found


def retrieval(clip: EmbeddedClip, pool: Pool, count: int, among: int = 100) -> float:
    """How often a picture's own caption is the best of `among` different captions."""
    first = sorted({text: row for row, text in reversed(list(enumerate(pool.captions)))}.values())[:count]
    images = clip.embed_images([Image.fromarray(pool.images[row]) for row in first])
    texts = clip.embed_texts([pool.captions[row] for row in first])
    hits = []
    for start in range(0, len(first), among):
        scores = images[start : start + among] @ texts[start : start + among].T
        hits += (scores.argmax(1) == torch.arange(len(scores))).tolist()
    return float(np.mean(hits))


def class_nouns_found(clip: EmbeddedClip) -> float:
    """For what share of the held-out subjects `embedded-clip` finds the class noun in their photos."""
    hits = []
    for name, (noun, _) in HELD_OUT.items():
        photos = [Image.open(path).convert("RGB") for path in sorted((subjects_path() / name).glob("*.png"))]
        hits.append(find_class_noun(clip, photos, tuple(NOUNS), "a {}").noun == noun)
    return float(np.mean(hits))


def instance_choice(dino: EmbeddedDino, drawings: Sprites, trials: int, among: int) -> float:
    """How often a new scene of an individual is closest to another scene of it, among individuals of its class."""
    rng = np.random.default_rng(GALLERY_SEED)
    words = [word for word in NOUNS if word in drawings.nouns]
    queries, gallery = [], []
    for _ in range(trials):
        noun = words[int(rng.integers(len(words)))]
        names = [str(name) for name in rng.choice(drawings.drawings(noun), among)]
        kin = [Instance.sample(noun, name, rng) for name in names]
        contexts = [str(c) for c in rng.choice(list(CONTEXTS), among + 1)]
        places = [Scene(who, seed=int(rng.integers(2**31)), context=c) for who, c in zip(kin, contexts, strict=False)]
        new = Scene(kin[0], seed=int(rng.integers(2**31)), context=contexts[-1])
        queries.append(Image.fromarray(render(new, drawings, dino.size)))
        gallery += [Image.fromarray(render(scene, drawings, dino.size)) for scene in places]
    scores = torch.einsum("td,tgd->tg", dino.embed_images(queries), dino.embed_images(gallery).view(trials, among, -1))
    return float((scores.argmax(1) == 0).float().mean())


def seconds_per_image(pipeline: StableDiffusionXLPipeline, times: int = 5) -> float:
    """The median time of one picture on one core of the CPU, at `STEPS` steps with guidance."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        sample(pipeline, ["a dog on the beach"])
        taken.append(time.perf_counter() - began)
    torch.set_num_threads(threads)
    return float(np.median(taken))
