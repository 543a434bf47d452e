"""DeepSpeed's compiled kernels survive whatever happens to the process that compiles them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pipelines.kernels import compile_kernels, kernel_folder

COMPILE = "from pipelines.kernels import compile_kernels; compile_kernels()"


def test_a_mark_left_by_a_killed_compilation_blocks_nobody() -> None:
    compile_kernels()
    kernels = [path.parent for path in kernel_folder().glob("*/build.ninja")]
    assert kernels
    marks = [kernel / "lock" for kernel in kernels]
    try:
        for mark in marks:
            mark.touch()
        subprocess.run([sys.executable, "-c", COMPILE], check=True, timeout=120, cwd=Path(__file__).parents[2])
        assert not any(mark.exists() for mark in marks)
    finally:
        for mark in marks:
            mark.unlink(missing_ok=True)
