"""Joining a Ray cluster, or starting a local one, and checking that it can do the work."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import dreambooth
import pipelines
from dreambooth.runs import Resources
from dreambooth.store import SubjectStore


@contextmanager
def ray_session(resources: Resources, verbose: bool) -> Iterator[str]:
    """Join the cluster of the job that this is, or the one that RAY_ADDRESS names, or start a local one.

    Yields a line that tells which, and where the logs are. Raises ValueError when a cluster of our own is too small.
    """
    with contextlib.nullcontext("this terminal") if verbose else _stderr_to_file() as log, _path_of_workers():
        context = ray.init(
            # Left to itself Ray also tries the cluster last started here, and waits for minutes when it is gone.
            address=None if _joins_a_cluster() else "local",
            log_to_driver=verbose,
            logging_level="INFO" if verbose else "ERROR",
            runtime_env=_code_to_ship(),
            namespace="dreambooth",
        )
        try:
            address, session = context.address_info["address"], context.address_info["session_dir"]
            yield f"Ray cluster at {address}; logs in {session}/logs and {log}{_check_resources(resources)}"
        finally:
            ray.shutdown()


@contextmanager
def _stderr_to_file() -> Iterator[str]:
    """Send standard error to a file while the block runs: Ray's Python and native parts both write there."""
    sys.stderr.flush()
    terminal = os.dup(2)
    file, path = tempfile.mkstemp(prefix="dreambooth-", suffix=".log")
    os.dup2(file, 2)
    os.close(file)
    try:
        yield path
    finally:
        sys.stderr.flush()
        os.dup2(terminal, 2)
        os.close(terminal)


@contextmanager
def _path_of_workers() -> Iterator[None]:
    """Let workers of a Ray that is started here import the project from where this process does, in any folder."""
    before = os.environ.get("PYTHONPATH")
    root = str(Path(pipelines.__file__ or "").parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *([before] if before else [])])
    try:
        yield
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _joins_a_cluster() -> bool:
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ or os.environ.get("RAY_ADDRESS", "local") != "local"


def _code_to_ship() -> dict[str, Any] | None:
    """The project's packages, when the cluster's nodes may lack them; a submitted job brings its working directory."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ or not _joins_a_cluster():
        return None
    packages = [Path(module.__file__ or "").parent for module in (dreambooth, pipelines)]
    return {"py_modules": [str(package) for package in packages]}


def _check_resources(resources: Resources) -> str:
    """What a joined cluster still lacks, as an autoscaler may bring it; on this machine alone it is an error."""
    have = ray.cluster_resources()
    waits = ""
    for name, each in (("CPU", resources.cpus_per_worker), ("GPU", resources.gpus_per_worker)):
        wanted = each * resources.workers
        if wanted <= have.get(name, 0):
            continue
        lack = f"--workers {resources.workers} needs {wanted:g} {name}s, and there are {have.get(name, 0):g}"
        if not _joins_a_cluster():
            raise ValueError(f"{lack}: lower --workers or --{name.lower()}s-per-worker")
        waits += f"; waiting for more nodes: {lack}"
    return waits


def check_reachable(store: SubjectStore) -> None:
    """Make sure that every node reads what this process writes to the store; ValueError names a node that does not."""
    if store.root.local is None:
        return
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1:
        return
    probe = store.root / "runs" / f"probe-{ray.get_runtime_context().get_job_id()}"
    probe.write_bytes(b"seen")

    @ray.remote(num_cpus=0)
    def sees(path: str) -> bool:
        return Path(path).exists()

    try:
        for node in nodes:
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            if not ray.get(sees.options(scheduling_strategy=here).remote(probe.path)):
                raise ValueError(
                    f"store {store.root} is not shared: node {node['NodeManagerAddress']} does not see it. Use a path "
                    "on a shared file system, or a URI such as s3://bucket/store"
                )
    finally:
        probe.filesystem.delete_file(probe.path)
