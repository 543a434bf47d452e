"""The C++ ops that DeepSpeed compiles when they are first needed, kept where a killed process cannot block them."""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.comm.torch import build_shm_op
from deepspeed.ops.op_builder import AsyncIOBuilder

from dreambooth.common.location import digest


def ops_folder() -> Path:
    """Where the ops of this environment lie, under TORCH_EXTENSIONS_DIR if that is set.

    Another environment's headers have other paths, so two that share a folder would compile at every turn.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/dreambooth/ops").expanduser()
    return root / f"torch-{torch.__version__}-deepspeed-{deepspeed.__version__}-{digest(sys.prefix, 8)}"


def compile_ops(with_async_io: bool = False) -> None:
    """Compile the ops that `deepspeed.initialize` is going to load, or load them where they are compiled already.

    torch marks a compilation under way with a file. A process killed then leaves it behind, and every later one waits
    for it for ever. The guard here is a lock that ends with its holder, so a mark that is found under it is stale.
    """
    folder = ops_folder()
    folder.mkdir(parents=True, exist_ok=True)
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    try:
        with (folder / "guard").open("w") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            for mark in folder.glob("*/lock"):
                mark.unlink()
            build_shm_op()
            if with_async_io:
                AsyncIOBuilder().load(verbose=False)
    finally:
        os.environ.pop("TORCH_EXTENSIONS_DIR")
        if given is not None:
            os.environ["TORCH_EXTENSIONS_DIR"] = given
