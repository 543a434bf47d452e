"""DeepSpeed's compiled ops survive whatever happens to the process that compiles them."""

from __future__ import annotations

import subprocess
import sys

from pipelines.engine.compiled_ops import compile_ops, ops_folder
from tests.conftest import ROOT

COMPILE = "from pipelines.engine.compiled_ops import compile_ops; compile_ops()"


def test_a_mark_left_by_a_killed_compilation_blocks_nobody() -> None:
    compile_ops()
    built = [path.parent for path in ops_folder().glob("*/build.ninja")]
    assert built
    marks = [folder / "lock" for folder in built]
    try:
        for mark in marks:
            mark.touch()
        subprocess.run([sys.executable, "-c", COMPILE], check=True, timeout=120, cwd=ROOT)
        assert not any(mark.exists() for mark in marks)
    finally:
        for mark in marks:
            mark.unlink(missing_ok=True)
