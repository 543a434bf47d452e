"""Clusters of several nodes on this machine, which Ray's `Cluster` starts without tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from ray._private.authentication_test_utils import reset_auth_token_state


@contextmanager
def without_tokens() -> Iterator[None]:
    """Let this process neither send nor expect tokens while the block runs; a Ray of its own has them again after."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_MODE", "disabled")
        reset_auth_token_state()
        yield
    reset_auth_token_state()
