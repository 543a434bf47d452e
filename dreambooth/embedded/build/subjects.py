"""The held-out subjects: individuals whose drawing pretraining never shows, as a small DreamBench of our own."""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from dreambooth.embedded.instances import Instance
from dreambooth.embedded.scenes import Scene, Sprites, render
from dreambooth.embedded.vocabulary import ACCESSORIES, COLOURS, CONTEXTS, HELD_OUT, PROPERTIES

SUBJECT_SEED = 4
SUBJECT_SIZE = 256
PHOTO_CONTEXTS: tuple[str | None, ...] = (None, "wood", "mountain", "dirt", None)
"""Where the five photos of a subject are taken; the subject is in its own colours in all of them."""

_OBJECT_CONTEXTS = tuple(context for context in CONTEXTS if context != "night")
_LIVE_CONTEXTS = _OBJECT_CONTEXTS[:10]
_CHANGES = ("red", "purple", "shiny", "wet", "cube shaped")


def subject_scenes(name: str) -> list[Scene]:
    """The photo-like scenes of one held-out subject."""
    noun, drawing = HELD_OUT[name]
    rng = np.random.default_rng([SUBJECT_SEED, *name.encode()])
    instance = Instance(noun, drawing)
    return [Scene(instance, seed=int(rng.integers(2**31)), context=context) for context in PHOTO_CONTEXTS]


def write_subjects(sprites: Path, folder: Path) -> None:
    """Write `folder/NAME/00.png ...` and the listing, in DreamBench's layout."""
    drawings = Sprites.load(sprites, size=SUBJECT_SIZE)
    for name in HELD_OUT:
        target = folder / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for index, scene in enumerate(subject_scenes(name)):
            picture = Image.fromarray(render(scene, drawings, SUBJECT_SIZE))
            picture.save(target / f"{index:02d}.png", optimize=True)
    (folder / "prompts_and_classes.txt").write_text(listing())


def listing() -> str:
    """The classes and both prompt lists, in the shape of DreamBench's `prompts_and_classes.txt`."""
    assert set(_CHANGES) <= {*COLOURS, *PROPERTIES}
    changes = [f"a {word} {{0}} {{1}}" for word in _CHANGES]
    objects = [f"a {{0}} {{1}} {CONTEXTS[context]}" for context in _OBJECT_CONTEXTS] + changes
    live = [f"a {{0}} {{1}} {CONTEXTS[context]}" for context in _LIVE_CONTEXTS]
    live += [f"a {{0}} {{1}} {words}" for words in ACCESSORIES.values()] + changes

    def block(prompts: list[str]) -> str:
        return "prompt_list = [\n" + ",\n".join(f"'{p}'.format(unique_token, class_token)" for p in prompts) + "\n]\n"

    classes = "".join(f"{name},{noun}\n" for name, (noun, _) in sorted(HELD_OUT.items()))
    return (
        f"Classes\n\nsubject_name,class\n{classes}\nPrompts\n\n"
        f"Object Prompts\n\n{block(objects)}\nLive Subject Prompts\n\n{block(live)}"
    )
