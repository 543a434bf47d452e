"""The paper's scores, Ruiz et al., CVPR 2023, section 4.1: from pictures to numbers.

DINO, CLIP-I   mean similarity of all pictures drawn of the subject with all its photos: subject fidelity
CLIP-T         mean similarity of each picture with its prompt, without the identifier: prompt fidelity
PRES           mean DINO similarity of pictures of the class with the subject's photos; lower is better, since a class
               whose other members have come to look like the subject is not preserved
DIV            mean LPIPS distance of pictures drawn of one prompt: diversity

These names are kept for the paper's own encoders; scores of others name them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean

from PIL import Image
from torch import Tensor

from dreambooth.metrics import Judge, TextJudge
from dreambooth.metrics.clip import CLIP, ClipJudge
from dreambooth.metrics.dino import DINO, DinoJudge
from dreambooth.metrics.embedded import EmbeddedClip, EmbeddedDino
from dreambooth.metrics.lpips import Lpips

Pictures = Sequence[Image.Image]


@dataclass(frozen=True)
class Judging:
    """Which judges score, by hub id or folder; `embedded` for those that ship, whose scores carry their names."""

    dino: str = DINO
    clip: str = CLIP
    lpips: str | None = None
    """LPIPS weights; DIV is left out without them."""

    @classmethod
    def embedded(cls) -> Judging:
        """The judges that ship with the package, for the embedded backbone's pictures."""
        return cls(EmbeddedDino.name, EmbeddedClip.name)

    def load(self, device: str = "cpu") -> Judges:
        """Load them; ValueError names one that cannot be."""
        if self.dino == EmbeddedDino.name:
            dino = EmbeddedDino(device=device)
            return Judges(dino, EmbeddedClip(device=device), partial(_dissimilarities, dino), f"1 - {dino.name}")
        distances = Lpips(self.lpips, device).distances if self.lpips else None
        name = Lpips.name if distances else None
        return Judges(DinoJudge(self.dino, device), ClipJudge(self.clip, device, paper=True), distances, name)

    def names(self) -> dict[str, str]:
        """The scores' names by what they are of the paper's."""
        if self.dino == EmbeddedDino.name:
            return {name: f"embedded-{name.lower()}" for name in SCORES}
        dino, clip = (
            "" if Path(given).name == Path(paper).name else f" ({Path(given).name})"
            for given, paper in ((self.dino, DINO), (self.clip, CLIP))
        )
        return {name: name + {"DINO": dino, "PRES": dino, "DIV": ""}.get(name, clip) for name in SCORES}


SCORES = ("DINO", "CLIP-I", "CLIP-T", "PRES", "DIV")


@dataclass(frozen=True)
class Judges:
    """The judges of one evaluation."""

    dino: Judge
    clip: TextJudge
    distances: Callable[[Pictures], Tensor] | None
    """Distances (N, N) between pictures, or None without such a judge."""
    distance: str | None
    """What that judge is called."""

    def of_photos(self, photos: Pictures) -> Photos:
        """What the scores need of a subject's photos."""
        return Photos(self.dino.embed_images(photos), self.clip.embed_images(photos))

    def score(
        self, drawn: Mapping[str, Pictures], class_pictures: Pictures, photos: Photos
    ) -> tuple[dict[str, float | None], dict[str, dict[str, float | None]]]:
        """The scores of a model by the paper's names, and those of each prompt alone.

        `drawn` holds the pictures of the subject by their prompts, in which the class noun alone stands for it.
        """
        texts = self.clip.embed_texts(list(drawn))
        by_prompt: dict[str, dict[str, float | None]] = {}
        for (prompt, pictures), text in zip(drawn.items(), texts, strict=True):
            clip = self.clip.embed_images(pictures)
            by_prompt[prompt] = {
                "DINO": mean_similarity(self.dino.embed_images(pictures), photos.dino),
                "CLIP-I": mean_similarity(clip, photos.clip),
                "CLIP-T": float((clip @ text).mean()),
                "DIV": mean_of_pairs(self.distances(pictures)) if self.distances is not None else None,
            }
        pres = mean_similarity(self.dino.embed_images(class_pictures), photos.dino) if class_pictures else None
        means = {name: _mean([scores[name] for scores in by_prompt.values()]) for name in SCORES if name != "PRES"}
        return {name: {**means, "PRES": pres}[name] for name in SCORES}, by_prompt


@dataclass(frozen=True)
class Photos:
    """A subject's photos as the judges see them: unit vectors (N, D)."""

    dino: Tensor
    clip: Tensor

    @cached_property
    def scores(self) -> dict[str, float | None]:
        """The photos' similarity with each other, what the paper's tables call real images."""
        of = {"DINO": mean_of_pairs(self.dino @ self.dino.T), "CLIP-I": mean_of_pairs(self.clip @ self.clip.T)}
        return {name: of.get(name) for name in SCORES}


def mean_similarity(drawn: Tensor, photos: Tensor) -> float:
    """The mean over all pairs of unit vectors (N, D) and (M, D)."""
    return float((drawn @ photos.T).mean())


def mean_of_pairs(matrix: Tensor) -> float | None:
    """The mean of a symmetric matrix (N, N) over pairs of different members; None when there is no pair."""
    count = len(matrix)
    return float((matrix.sum() - matrix.trace()) / (count * (count - 1))) if count > 1 else None


def _dissimilarities(judge: Judge, pictures: Pictures) -> Tensor:
    vectors = judge.embed_images(pictures)
    return 1 - vectors @ vectors.T


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
