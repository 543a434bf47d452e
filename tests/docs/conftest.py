"""A reader's working directory, in which commands of the pages can be tried."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import uvicorn
from safetensors.torch import save_file

from dreambooth.backbones import open_backbone
from dreambooth.common.location import Location
from dreambooth.metrics import lpips
from dreambooth.store import SubjectStore
from serve.api.auth import KeyFolder
from serve.api.image_files import ImageFiles
from serve.api.routes import ApiConfig, create_api
from serve.catalog.catalog import Catalog
from serve.config import GIB
from serve.engine.replica import SubjectReplica
from serve.request import DrawnImage, GenerationRequest
from tests.conftest import ROOT
from tests.docs.pages import page
from tests.pipelines.untrained_versions import publish_untrained


@dataclass(frozen=True)
class Reader:
    """A working directory with what the pages take for granted, and what their placeholders stand for here."""

    folder: Path
    store: SubjectStore
    judges: list[str]
    """Options of `evaluate` that name small judges, since those of the paper come from a hub."""
    placeholders: dict[str, str]

    def real(self, text: str) -> str:
        """The text with placeholders replaced."""
        for name, value in self.placeholders.items():
            text = text.replace(name, value)
        return text


@pytest.fixture(scope="session")
def reader(
    tmp_path_factory: pytest.TempPathFactory,
    photos: Path,
    small_sdxl: Path,
    small_stable_diffusion: Path,
    small_if: Path,
    small_if_super_resolution: Path,
    small_upscaler: Path,
    small_dino: Path,
    small_clip: Path,
) -> Reader:
    """The reader's checkout, with photos beside it, and a store in which rex and another subject are published."""
    folder = tmp_path_factory.mktemp("reader")
    for path in ROOT.iterdir():
        if path.name[0] != ".":
            (folder / path.name).symlink_to(path)
    shutil.copytree(photos, folder / "photos")
    shutil.copytree(photos, folder / "photos" / "rex")
    shutil.copytree(photos, folder / "bucket" / "mug")
    for number, path in enumerate(sorted((folder / "bucket" / "mug").iterdir())):
        path.rename(path.with_name(f"{number}.jpg"))  # what is in a file counts, not what it is called

    home = folder / "home"
    store = SubjectStore(home / "dreambooth-store")
    trained = publish_untrained(store, photos, small_sdxl, "--subject", "rex")
    inverted = publish_untrained(store, photos, small_sdxl, "--subject", "rex", "--method", "textual-inversion")
    publish_untrained(store, photos, small_sdxl, "--subject", "backpack")
    for place in (folder / "dreambooth-store", folder / "bucket" / "store"):
        place.symlink_to(home / "dreambooth-store")
    key, _ = KeyFolder(store.root / "keys").make("me", ("*",))
    _, spare = KeyFolder(store.root / "keys").make("another", ("*",))
    (folder / "key").write_text(f"{key}\n")

    save_file({name: torch.zeros(1) for name in lpips._names()}, folder / "lpips.safetensors")
    reader = Reader(
        folder,
        store,
        [f"--dino={small_dino}", f"--clip={small_clip}"],
        {
            "s3://bucket": str(folder / "bucket"),
            "s3://my-bucket": str(folder / "bucket"),
            "stabilityai/stable-diffusion-xl-base-1.0": str(small_sdxl),
            "stable-diffusion-v1-5/stable-diffusion-v1-5": str(small_stable_diffusion),
            "DeepFloyd/IF-I-XL-v1.0": str(small_if),
            "DeepFloyd/IF-II-L-v1.0": str(small_if_super_resolution),
            "stabilityai/stable-diffusion-x4-upscaler": str(small_upscaler),
            "0123456789ab": trained.id,
            "ba9876543210": inverted.id,
            "KEY_ID": spare.id,
            "$(cat key)": key,
        },
    )
    [manifest] = [block for block in page("docs/many-subjects.md").blocks if block.language == "yaml"]
    [config] = [block for block in page("docs/training.md").blocks if block.language == "yaml"]
    (folder / "subjects.yaml").write_text(reader.real(manifest.text))
    (folder / "run.yaml").write_text(reader.real(config.text))
    return reader


@pytest.fixture
def at_work(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    """The reader, who is in the working directory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(reader.folder)
    monkeypatch.setenv("HOME", str(reader.folder / "home"))
    yield reader
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def server(reader: Reader, small_sdxl: Path) -> Iterator[str]:
    """The address of the API over the reader's store: all but Ray Serve is that of a server."""
    backbone = open_backbone(small_sdxl).hash
    replicas: list[SubjectReplica] = []
    starting = asyncio.Lock()

    async def draw(_: str, order: GenerationRequest) -> AsyncIterator[DrawnImage]:
        async with starting:
            if not replicas:
                replicas.append(
                    SubjectReplica(
                        *(reader.store.root.uri, backbone),
                        **{"precision": "fp32", "device": "cpu", "threads": 1, "batch": 1, "host_memory": GIB},
                        **{"disk": str(reader.folder / "disk"), "disk_space": GIB, "keep": (), "wedged_after": 60.0},
                    )
                )
        async for image in replicas[0].draw(order):
            yield image

    root = reader.store.root
    rules = ApiConfig(KeyFolder(root / "keys"), ImageFiles(Location.of(reader.folder / "images"), 60))
    api = create_api(Catalog(reader.store, [backbone]), draw, rules)
    running = uvicorn.Server(uvicorn.Config(api, port=0, log_level="error"))
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    running.should_exit = True
    thread.join()


def expanded(word: str) -> str:
    """A word as the shell hands it over: `~` and variables stand for their values."""
    return os.path.expandvars(os.path.expanduser(word))
