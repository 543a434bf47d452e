"""`cluster/` against the schemas of those who will read it, and against the rest of the project."""

import copy
import fnmatch
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
SCRIPT = ROOT / "pipelines" / "personalize.py"
CONSTRAINTS = ROOT / "constraints.txt"

RAYJOB = yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())
LAUNCHER = yaml.safe_load((CLUSTER / "launcher.yaml").read_text())
CONTAINERFILE = (CLUSTER / "Containerfile").read_text()
README = (CLUSTER / "README.md").read_text()
SCHEMA = json.loads((Path(__file__).parent / "kuberay_rayjob.schema.json").read_text())

HEAD = "spec.rayClusterSpec.headGroupSpec"
WORKERS = "spec.rayClusterSpec.workerGroupSpecs.0"


def changed(document: Any, path: str, value: Any) -> Any:
    """A copy of `document` with the value at a dotted path set; `None` removes it."""
    document = copy.deepcopy(document)
    *parents, last = (int(key) if key.isdigit() else key for key in path.split("."))
    node = document
    for key in parents:
        node = node[key]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return document


# The checks, each a function that raises ----------------------------------------------------------------------------


def check_rayjob(manifest: dict[str, Any]) -> None:
    """The RayJob by KubeRay's fields, its pod templates by Kubernetes' own strict schemas."""
    jsonschema.Draft202012Validator(SCHEMA).validate(manifest)
    cluster = manifest["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


def check_launcher(config: dict[str, Any]) -> None:
    """What `ray up` does before it calls the cloud."""
    validate_config(prepare_config(copy.deepcopy(config)))


INSTRUCTIONS = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "LABEL", "RUN", "SHELL", "USER", "WORKDIR"}


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Containerfile, with comments gone and continued lines joined."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    return [
        (name, rest.strip())
        for name, _, rest in (line.strip().partition(" ") for line in lines.replace("\\\n", " ").splitlines())
        if name
    ]


def check_tag(image: str) -> None:
    tag = image.rpartition("/")[2].partition(":")[2]
    assert tag, f"{image} has no tag"
    assert "latest" not in tag, f"{image} changes under the same tag"


def in_build_context(source: str) -> bool:
    """Whether `.dockerignore` lets a path at the root of the checkout through; the last matching line wins."""
    included = True
    for line in (ROOT / ".dockerignore").read_text().split("\n"):
        pattern = line.strip().removeprefix("!")
        if pattern and not pattern.startswith("#") and fnmatch.fnmatch(source, pattern):
            included = line.startswith("!")
    return included


def check_containerfile(text: str) -> None:
    parsed = instructions(text)
    assert not (unknown := {name for name, _ in parsed} - INSTRUCTIONS), unknown
    args = dict(rest.split("=", 1) for name, rest in parsed if name == "ARG")
    users = []
    for name, rest in parsed:
        if name == "FROM":
            check_tag(re.sub(r"\$\{(\w+)\}", lambda match: args[match[1]], rest.split()[0]))
        elif name == "USER":
            users.append(rest)
        elif name == "COPY":
            *sources, _ = (word for word in shlex.split(rest) if not word.startswith("--"))
            for source in sources:
                assert (ROOT / source).exists(), f"COPY of {source}, which is not there"
                assert source == "." or in_build_context(source), f".dockerignore keeps {source} out"
        elif name == "RUN":
            for command in re.findall(r"pip install[^&|;]*", rest):
                assert "--constraint constraints.txt" in command or "--no-deps" in command, f"unpinned: {command}"
    assert users, "no USER"
    assert users[-1].partition(":")[0] not in ("root", "0"), "the image runs as root"


CHECKS: dict[str, tuple[Callable[[Any], None], Any]] = {
    "rayjob": (check_rayjob, RAYJOB),
    "launcher": (check_launcher, LAUNCHER),
    "containerfile": (check_containerfile, CONTAINERFILE),
}


@pytest.mark.parametrize("name", CHECKS)
def test_file_is_valid(name: str):
    check, document = CHECKS[name]
    check(document)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("apiVersion", "ray.io/v1alpha1"),
        ("kind", "RayCluster"),
        ("metadata.name", "Dream_Booth"),
        ("spec.entryPoint", "python"),
        ("spec.entrypoint", None),
        ("spec.backoffLimit", "1"),
        ("spec.activeDeadlineSeconds", 0),
        ("spec.shutdownAfterJobFinishes", True),
        ("spec.deletionStrategy.deletionRules", []),
        ("spec.deletionStrategy.deletionRules.0.policy", "DeleteAll"),
        ("spec.deletionStrategy.deletionRules.0.policy", "DeleteWorkers"),
        ("spec.deletionStrategy.deletionRules.0.condition.jobDeploymentStatus", "Failed"),
        ("spec.rayClusterSpec.rayVersion", None),
        ("spec.rayClusterSpec.authOptions.mode", "tokens"),
        ("spec.rayClusterSpec.autoscalerOptions.version", "v3"),
        ("spec.rayClusterSpec.autoscalerOptions.idleTimeout", 60),
        (f"{HEAD}.rayStartParams.num-cpus", 0),
        (f"{HEAD}.template.spec.container", []),
        (f"{HEAD}.template.spec.containers.0.name", None),
        (f"{HEAD}.template.spec.containers.0.ports.0.containerPort", "6379"),
        (f"{WORKERS}.maxReplica", 4),
        (f"{WORKERS}.maxReplicas", None),
        (f"{WORKERS}.template.spec.containers.0.resources.limit", {}),
        (f"{WORKERS}.template.spec.volumes.0.emptyDir.medum", "Memory"),
    ],
)
def test_broken_rayjob_is_refused(path: str, value: Any):
    with pytest.raises(jsonschema.ValidationError):
        check_rayjob(changed(RAYJOB, path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("provider.region", 1),
        ("max_worker", 4),
        ("max_workers", "4"),
        ("docker.imag", "dreambooth:1"),
        ("docker.container_name", None),
        ("head_node_type", "haed"),
        ("available_node_types.gpu.min_worker", 0),
        ("available_node_types.gpu.min_workers", 5),
        ("available_node_types.gpu.node_config", None),
        ("available_node_types.gpu.resources.GPU", "4"),
    ],
)
def test_broken_launcher_is_refused(path: str, value: Any):
    with pytest.raises((jsonschema.ValidationError, ValueError, AssertionError)):
        check_launcher(changed(LAUNCHER, path, value))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (":${RAY_VERSION}-py311-gpu", "", "has no tag"),
        ("${RAY_VERSION}", "latest", "changes under the same tag"),
        ("USER ray", "USER root", "runs as root"),
        ("USER ray\n", "", "no USER"),
        ("WORKDIR", "WORKDIRR", "WORKDIRR"),
        ("pyproject.toml constraints.txt ./", "pyproject.tom ./", "not there"),
        ("pyproject.toml constraints.txt ./", "pyproject.toml cluster ./", "keeps cluster out"),
        (" --constraint constraints.txt", "", "unpinned"),
    ],
)
def test_broken_containerfile_is_refused(old: str, new: str, reason: str):
    assert old in CONTAINERFILE
    with pytest.raises(AssertionError, match=reason):
        check_containerfile(CONTAINERFILE.replace(old, new))


# Agreement with the rest of the project -----------------------------------------------------------------------------


def containers() -> list[dict[str, Any]]:
    cluster = RAYJOB["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [container for group in groups for container in group["template"]["spec"]["containers"]]


def test_images_carry_the_project_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    images = {LAUNCHER["docker"]["image"], *(container["image"] for container in containers())}
    images.update(re.findall(r"\S+/dreambooth:\S+", CONTAINERFILE + README))
    assert {image.rpartition(":")[2] for image in images} == {version}
    assert len(images) == 1


def test_ray_version_is_the_pinned_one():
    pins = dict(re.findall(r"^([\w.-]+)(?:\[[^]]*\])?==([^\s;]+)", CONSTRAINTS.read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:\b[Rr]ay|RAY_VERSION)\D{0,3}(\d+\.\d+\.\d+)", CONTAINERFILE + README))
    assert named
    assert named | {RAYJOB["spec"]["rayClusterSpec"]["rayVersion"]} == {pins["ray"]}
    assert pins["ray"] == ray.__version__
    assert "-py{}{}-".format(*sys.version_info) in CONTAINERFILE
    assert "+" not in pins["torch"], "a CPU build by its label would keep the GPU build out of the image"


def commands() -> dict[str, list[str]]:
    """The arguments of every call of the main job in `cluster/`, by the file and the place in it."""
    found = {"rayjob.yaml": RAYJOB["spec"]["entrypoint"]}
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if "personalize.py" in line:
                found[f"README.md {len(found)}"] = line
    return {where: shlex.split(line.partition("personalize.py")[2]) for where, line in found.items()}


def test_readme_shows_the_job_for_each_way():
    assert len(commands()) >= 3


@pytest.mark.long
def test_options_exist():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    shown = subprocess.run(
        [sys.executable, str(SCRIPT), "--help-all"], env=environment, capture_output=True, text=True, check=True
    ).stdout
    options = set(re.findall(r"--[a-z][a-z0-9-]*", shown))
    for where, arguments in commands().items():
        unknown = {word.partition("=")[0] for word in arguments if word.startswith("--")} - options
        assert not unknown, f"{where}: {unknown}"


def test_entrypoint_is_one_plain_command():
    # KubeRay puts it unquoted into the shell line of its submitter.
    assert not set(RAYJOB["spec"]["entrypoint"]) & set("\n;&|<>$`'\"")


def test_the_lane_fits_the_worker_group():
    arguments = commands()["rayjob.yaml"]
    lane = int(arguments[arguments.index("--workers") + 1]) * int(arguments[arguments.index("--gpus-per-worker") + 1])
    group = RAYJOB["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    resources = containers()[1]["resources"]
    assert resources["requests"] == resources["limits"]
    assert lane == int(resources["limits"]["nvidia.com/gpu"])
    assert lane == LAUNCHER["available_node_types"]["gpu"]["resources"]["GPU"]
    assert group["minReplicas"] <= 1 <= group["maxReplicas"]


def test_token_authentication_is_on():
    assert RAYJOB["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    options = [option for line in LAUNCHER["docker"]["run_options"] for option in line.split()]
    assert "RAY_AUTH_MODE=token" in options
    token = next(option.partition("=")[2] for option in options if option.startswith("RAY_AUTH_TOKEN_PATH="))
    assert LAUNCHER["file_mounts"][token] == "~/.ray/auth_token"
