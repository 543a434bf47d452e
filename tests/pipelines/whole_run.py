"""The main job as a process of its own, with settings under which each of its stages can be met at work."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

SETTINGS = (
    "--class-noun mug --prior-images 24 --prior-batch 4 --prior-steps 20 --batch 4 --steps 60 --learning-rate 1e-3 "
    "--schedule cosine --warmup-steps 5 --ema-decay 0.9 --checkpoint-every 20 --workers 2 --sample-steps 3"
)


@dataclass
class WholeRun:
    """A run of these photos on this backbone into this store."""

    photos: Path
    backbone: Path
    store: Path
    output: str = ""
    errors: str = ""

    @property
    def arguments(self) -> list[str]:
        named = ["--images", self.photos, "--backbone", self.backbone, "--store", self.store]
        return [*map(str, named), *SETTINGS.split()]

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "pipelines/personalize.py", *self.arguments],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A kill must reach the driver alone, as an operator's would.
            start_new_session=True,
        )

    def finish(self) -> None:
        """Run it, or what is left of it, to its end."""
        process = self.start()
        self.output, self.errors = process.communicate(timeout=500)
        assert process.returncode == 0, self.output + self.errors
