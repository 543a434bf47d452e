"""The build command: `python -m dreambooth.embedded.build --out DIR`, resumable, stage by stage.

Each stage leaves its result in the work folder and is skipped once it is there; a training stage goes on from its
checkpoint. `--minutes` bounds a call, which then ends with status 75 and is to be run again.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro

from dreambooth.embedded.build import stages
from dreambooth.embedded.build.adopt import adopt
from dreambooth.embedded.build.config import PRESETS
from dreambooth.embedded.build.training import Clock, OutOfTimeError

TRY_AGAIN = 75


@dataclass(frozen=True)
class Options:
    """Build the embedded backbone and its judges."""

    out: Path
    """The work folder: sprites, pools, checkpoints, and the package in `weights/`."""
    stage: Literal[("all", *stages.STAGES)] = "all"  # type: ignore[valid-type]
    """One stage alone; those before it must be done."""
    preset: Literal[tuple(PRESETS)] = "full"  # type: ignore[valid-type]
    """`full` for a GPU, `cpu` for hours on a few cores, `tiny` for a test."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """Where to train."""
    minutes: float = float("inf")
    """Stop after so long, with everything saved."""
    compile: bool = False
    """Train the U-Net through torch.compile: a minute of start-up, then faster steps."""
    workers: int = 2
    """Processes that render scenes."""
    sprites: Path | None = None
    """Sprites made before, instead of those out of npm's emoji packages."""
    continue_from: Path | None = None
    """Shipped weights whose U-Net is to be trained further; their other parts are taken as they are."""


def main(options: Options) -> int:
    """Run the stages asked for; the exit status says whether they are done."""
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    clock = Clock(time.monotonic() + 60 * options.minutes, torch.device(options.device), options.compile)
    build = stages.Build(options.out, PRESETS[options.preset], clock, options.workers, options.sprites, options.preset)
    if options.continue_from is not None:
        adopt(options.continue_from, build.config, build.out)
    chosen: dict[str, Callable[[stages.Build], None]] = stages.STAGES
    if options.stage != "all":
        chosen = {options.stage: stages.STAGES[options.stage]}
    for name, run in chosen.items():
        print(f"stage {name}", flush=True)
        try:
            run(build)
        except OutOfTimeError as stop:
            print(f"{stop}; run the same command again", flush=True)
            return TRY_AGAIN
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
