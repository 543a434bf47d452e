"""The class noun of a subject whose owner gave none: zero-shot classification of its photos over a list of nouns.

In Ruiz et al., CVPR 2023, section 3.2, the user gives the class noun or a classifier finds it. The classifier here is
that of Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image
from torch import Tensor

TEMPLATE = "a photo of a {}"
_SCALE = 100.0
"""CLIP's softmax temperature, the bound at which its training ends."""

_NOUNS = """
backpack, stuffed animal, bowl, can, candle, cat, clock, sneaker, dog, toy, boot, glasses, cartoon, teapot, vase,
bear, bird, butterfly, camel, chicken, cow, deer, dolphin, duck, elephant, fish, fox, frog, giraffe, goat, hamster,
hedgehog, horse, lion, lizard, monkey, mouse, owl, panda, parrot, penguin, pig, rabbit, sheep, snake, squirrel, tiger,
turtle, wolf, zebra, baby, boy, girl, man, woman, bag, bracelet, camera, cap, coat, dress, earring, hat, handbag,
jacket, key, necklace, phone, purse, ring, sandal, scarf, shirt, shoe, suitcase, umbrella, wallet, watch, basket, bed,
blanket, book, bottle, box, cake, chair, computer, cup, desk, drum, fork, guitar, jar, keyboard, knife, lamp, laptop,
mug, painting, pan, pen, piano, pillow, pitcher, plant, plate, pot, robot, sculpture, sofa, spoon, statue, table,
television, violin, apple, banana, bread, flower, mushroom, pizza, tree, ball, balloon, doll, figurine, kite,
skateboard, tent, airplane, bicycle, boat, building, bus, car, house, motorcycle, ship, tractor, train, truck
"""
NOUNS = tuple(noun.strip() for noun in _NOUNS.split(","))
"""DreamBench's class nouns, then common animals, people, things that people wear, carry and live with, and vehicles."""


class PictureTextJudge(Protocol):
    """What is needed of a judge: pictures and texts as unit vectors of one space."""

    name: str

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures to unit vectors, float32 (N, D)."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to unit vectors, float32 (N, D)."""
        ...


@dataclass(frozen=True)
class FoundNoun:
    """A noun, its probability, those of the runners-up, and the judge that gave them."""

    noun: str
    score: float
    runners_up: tuple[tuple[str, float], ...]
    judge: str

    def __str__(self) -> str:
        """What a person is told."""
        others = ", ".join(f"{noun!r} {score:.2f}" for noun, score in self.runners_up)
        return f"{self.noun!r} with score {self.score:.2f} by {self.judge}; runners-up: {others}"


def find_class_noun(
    judge: PictureTextJudge,
    images: Sequence[Image.Image],
    nouns: Sequence[str] = NOUNS,
    template: str = TEMPLATE,
    runners_up: int = 3,
) -> FoundNoun:
    """The most probable of `nouns` for these photos of one subject, by its probability averaged over the photos.

    `nouns` and `template` are words that the judge knows.
    """
    logits = _SCALE * judge.embed_images(images) @ judge.embed_texts([template.format(noun) for noun in nouns]).T
    mean = logits.softmax(dim=-1).mean(dim=0)
    scores, order = mean.sort(descending=True, stable=True)
    ranked = [(nouns[index], score) for index, score in zip(order.tolist(), scores.tolist(), strict=True)]
    return FoundNoun(*ranked[0], tuple(ranked[1 : 1 + runners_up]), judge.name)
