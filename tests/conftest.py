"""What tests share: quiet libraries, a Ray of their own, small backbones, photos."""

from __future__ import annotations

import logging
import os
import socket

# A Ray cluster that happens to run on this machine is not the tests' to use.
os.environ["RAY_ADDRESS"] = "local"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from pipelines.runtime.console import quiet_libraries

quiet_libraries()

from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import ray  # noqa: E402
from PIL import Image  # noqa: E402

from dreambooth.common.location import Location  # noqa: E402
from tests.small_models import (  # noqa: E402
    write_clip,
    write_deepfloyd_if,
    write_deepfloyd_if_super_resolution,
    write_dino,
    write_sdxl,
    write_stable_diffusion,
    write_upscaler,
)

ROOT = Path(__file__).parent.parent

_ALONE = (
    "distributed/",
    "docs/test_tutorial.py",
    "pipelines/engine/test_world_size.py",
    "pipelines/runtime/test_actor_pools.py",
    "pipelines/stages/",
    "pipelines/test_",
    "pipelines/training/test_preemption.py",
    "pipelines/training/test_setup.py",
    "pipelines/training/test_train_step.py",
    "serve/test_app.py",
    "serve/test_command.py",
    "test_deprecations.py",
    "test_extensions.py",
)
"""Files and folders of tests that start Ray or several ranks, which keep both cores at work."""

_LONG = (
    "docs/test_blocks.py",
    "docs/test_commands.py",
    "dreambooth/backbones/test_deepfloyd_if.py",
    "dreambooth/embedded/",
    "dreambooth/methods/test_textual_inversion.py",
    "dreambooth/sampling/test_sampler.py",
    "dreambooth/subjects/test_identifier.py",
    "dreambooth/test_command.py",
    "dreambooth/test_memory.py",
    "pipelines/engine/",
    "pipelines/planning/test_plan.py",
    "pipelines/planning/test_preflight.py",
    "pipelines/training/test_train",
    "serve/api/test_openapi.py",
    "serve/engine/test_replica.py",
)
"""Files and folders of tests that start other processes, or train, sample and measure networks, for seconds each."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of these folders: `make test` runs those of `_ALONE` one by one, `make test-fast` none of them."""
    for item in items:
        place = item.path.relative_to(ROOT / "tests").as_posix()
        if place.startswith(_ALONE):
            item.add_marker(pytest.mark.alone)
        elif place.startswith(_LONG):
            item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session")
def small_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small SDXL."""
    return write_sdxl(tmp_path_factory.mktemp("backbones") / "sdxl")


@pytest.fixture(scope="session")
def small_stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small Stable Diffusion that predicts v."""
    return write_stable_diffusion(tmp_path_factory.mktemp("backbones") / "sd", "v_prediction")


@pytest.fixture(scope="session")
def small_if(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small stage I of DeepFloyd IF."""
    return write_deepfloyd_if(tmp_path_factory.mktemp("backbones") / "if-i")


@pytest.fixture(scope="session")
def small_if_super_resolution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small stage II of DeepFloyd IF."""
    return write_deepfloyd_if_super_resolution(tmp_path_factory.mktemp("backbones") / "if-ii")


@pytest.fixture(scope="session")
def small_upscaler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small upscaler."""
    return write_upscaler(tmp_path_factory.mktemp("backbones") / "x4")


@pytest.fixture(scope="session")
def small_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small CLIP."""
    return write_clip(tmp_path_factory.mktemp("judges") / "clip")


@pytest.fixture(scope="session")
def small_dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small DINO."""
    return write_dino(tmp_path_factory.mktemp("judges") / "dino-vits16")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three photo-like images of different shapes."""
    folder = tmp_path_factory.mktemp("photos") / "mug"
    folder.mkdir()
    for number, (height, width) in enumerate([(96, 96), (128, 80), (80, 120)]):
        rows, columns = np.mgrid[0:height, 0:width]
        pixels = np.stack([rows * 2 % 256, columns * 2 % 256, (rows + columns + 60 * number) % 256], -1)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def free_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def local_ray() -> None:
    """The Ray that test modules share; with its dashboard, which Ray Train asks for what runs when it ends."""
    if not ray.is_initialized():
        workers = {
            "worker_process_setup_hook": "tests.deprecations.raise_at_our_calls",
            "env_vars": {"PYTHONPATH": str(ROOT)},
        }
        ray.init(num_cpus=3, log_to_driver=False, logging_level="ERROR", runtime_env=workers)


@pytest.fixture(scope="module")
def no_ray() -> Iterator[None]:
    """No Ray in this process, for tests of what starts one."""
    ray.shutdown()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def dreambench() -> Path:
    """The folder of real photos; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("DREAMBENCH_DIR", ROOT.parent / "shared" / "dreambench"))
    if not folder.is_dir():
        pytest.skip(f"no real photos: {folder} is absent; name their folder in DREAMBENCH_DIR")
    return folder


@pytest.fixture(scope="session")
def bucket() -> Iterator[Location]:
    """A bucket of a real S3 protocol server."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    with pytest.MonkeyPatch.context() as environment:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            environment.setenv(name, "testing")
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        server.start()
        address = "{}:{}".format(*server.get_host_and_port())
        client = boto3.client("s3", endpoint_url=f"http://{address}", region_name="us-east-1")
        client.create_bucket(Bucket="bucket")
        yield Location(f"s3://bucket?endpoint_override={address}&scheme=http&region=us-east-1")
        server.stop()


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """An empty folder, once on a disk and once in an object store."""
    if request.param == "disk":
        return Location.of(tmp_path / "place")
    bucket: Location = request.getfixturevalue("bucket")
    return bucket / tmp_path.name
