"""What the tests of serving share."""

from __future__ import annotations

from pathlib import Path

import pytest

from dreambooth.store import SubjectStore, Version
from tests.serve.published import publish_all


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Coroutines are run by asyncio alone."""
    return "asyncio"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SubjectStore:
    """A store on the disk with the versions of `publish_all`."""
    return SubjectStore(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def versions(store: SubjectStore, small_sdxl: Path) -> list[Version]:
    """The versions in `store`, oldest first."""
    return publish_all(store, small_sdxl)
