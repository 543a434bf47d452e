"""The check that our code calls nothing which libraries are going to drop can fail: here, and in Ray's workers."""

from __future__ import annotations

import tomllib
import warnings

import pytest
import ray
from ray.util.annotations import RayDeprecationWarning

from pipelines.runtime.console import quiet_libraries
from tests.conftest import ROOT
from tests.deprecations import OURS


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning, PendingDeprecationWarning])
def test_what_our_modules_call_is_an_error_and_what_libraries_call_is_not(category: type[Warning]) -> None:
    quiet_libraries()
    for module in ("dreambooth", "dreambooth.store", "pipelines.stages.encode", "serve.app", "tests.test_x"):
        with pytest.raises(category, match="is deprecated"):
            warnings.warn_explicit("it is deprecated", category, "x.py", 1, module)
    for module in ("diffusers", "servers", "ray.serve", "transformers.pipelines"):
        warnings.warn_explicit("it is deprecated", category, "x.py", 1, module)
    filters = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["filterwarnings"]
    assert f"error::{category.__name__}:{OURS}" in filters


@pytest.mark.usefixtures("local_ray")
def test_an_argument_that_ray_data_will_drop_is_an_error() -> None:
    with pytest.raises(RayDeprecationWarning, match="ray_remote_args"):
        ray.data.range(2).map(dict, max_restarts=1)


def call_what_is_deprecated() -> None:
    quiet_libraries()  # as training workers do
    warnings.warn("it is deprecated", RayDeprecationWarning, stacklevel=1)


@pytest.mark.usefixtures("local_ray")
def test_it_is_an_error_in_rays_workers_too() -> None:
    with pytest.raises(RayDeprecationWarning, match="is deprecated"):
        ray.get(ray.remote(call_what_is_deprecated).options(num_cpus=0).remote())
