"""What the tests of the jobs share: one whole run of the main job."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipelines.whole_run import WholeRun


@pytest.fixture(scope="session")
def undisturbed_run(photos: Path, small_stable_diffusion: Path, tmp_path_factory: pytest.TempPathFactory) -> WholeRun:
    """A run that was never killed, and ended well."""
    run = WholeRun(photos, small_stable_diffusion, tmp_path_factory.mktemp("undisturbed"))
    run.finish()
    return run
