"""Processes for the ranks of a group, forked from one that has imported what they need and done nothing else."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from typing import Any

import torch.multiprocessing


def fork_server() -> ForkServerContext:
    """The context to make them in: a process that imports torch, diffusers and DeepSpeed itself takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipelines.training.trainer", "tests.pipelines.matrix"])
    return context


def run_ranks(function: Callable[..., None], arguments: tuple[Any, ...], world: int) -> None:
    """Call `function(rank, *arguments)` in `world` processes; raises what one of them raises."""
    fork_server()
    torch.multiprocessing.start_processes(function, arguments, world, start_method="forkserver")
