"""Every command of the pages is tried: its arguments are read by the real parser, and what runs here is run.

    personalize          planned as by --dry-run, on small models of the real classes
    evaluate             planned: the store's versions are found and the judges loaded
    serve, serve run     the application is built, which checks keys and store
    keys                 run
    curl                 sent to the real API in a server of its own
    ray, serve deploy    read by Ray's own parsers, and the command within a job as above
    make, python -m      the target is there; arguments are read

What is left is listed in `NOT_TRIED` with the reason. `test_tutorial.py` runs the tutorial's commands in a shell.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import socket
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tyro
import yaml

from pipelines import evaluate, personalize
from serve.app import app
from serve.config import ServeConfig
from tests.conftest import ROOT
from tests.docs.conftest import Reader, expanded
from tests.docs.pages import Block, page
from tests.docs.shell import COMMANDS, Command, commands_of, inner

NOT_TRIED = {
    "kubectl": "needs a Kubernetes cluster",
    "podman": "builds and pushes an image of many GB",
    "ray up": "needs a cloud",
    "ray down": "needs a cloud",
    "ray dashboard": "needs a cloud",
    "ray get-auth-token": "writes a token into the home of the user",
    "pip install": "installs",
    "pre-commit install": "is no dependency of the project, and changes the repository",
    "python3 -m venv": "installs",
    "source": "is the shell's",
    "export": "is the shell's",
}
"""Commands that are not tried, with the reasons; all but the shell's are others' commands."""


def untried(command: Command) -> bool:
    return any(" ".join(command.words).startswith(name) for name in NOT_TRIED)


TRIED = list({command.words: command for command in COMMANDS if not untried(command)}.values())


@pytest.mark.parametrize("command", TRIED, ids=str)
def test_a_command_is_one_that_runs(
    command: Command, at_work: Reader, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    try_command(command, at_work, request, monkeypatch)


def test_what_is_not_tried_is_on_a_page() -> None:
    written = [" ".join(command.words) for command in COMMANDS]
    assert [name for name in NOT_TRIED if not any(words.startswith(name) for words in written)] == []


WRONG = {
    "dreambooth personalize --images photos/ --class-noun dog --learning-speed 1": "--learning-speed",
    "dreambooth personalize --images holidays/ --class-noun dog": "holidays/: no such file or folder",
    "dreambooth evaluate --subject rex --images photos/ --versions some": "some",
    "dreambooth evaluate --subject max --images photos/ --store ~/dreambooth-store": "no version of 'max'",
    "dreambooth serve --store ~/dreambooth-store --prot 8000": "--prot",
    "dreambooth serve --store ~/empty --port 8000": "there is no store",
    "serve run serve.app:app store=$HOME/dreambooth-store replica=2": "replica",
    "serve run serve.app:app store=$HOME/empty": "there is no store",
    "dreambooth keys make --store ~/dreambooth-store --tenants me": "--tenant",
    "curl http://127.0.0.1:8000/v1/modules -H 'Authorization: Bearer $(cat key)'": "404",
    "curl http://127.0.0.1:8000/v1/models": "401",
    "ray job submit --working-directory . -- python pipelines/personalize.py": "--working-directory",
    "ray job submit --working-dir . -- python pipelines/personalise.py": "pipelines/personalise.py",
    "python -m tests.benchmarks.gpu --outfile h100.jsonl": "--outfile",
    "python -m dreambooth.embedded.build --out work --preset huge": "huge",
    "make demonstration": "demonstration",
    "rm -rf photos/": "rm -rf",
}
"""Commands with mistakes, and what must be said of each."""


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_is_found(
    line: str,
    at_work: Reader,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    [command] = commands_of(Block(page("README.md"), 0, "sh", line))
    with pytest.raises((Exception, SystemExit)) as raised:
        try_command(command, at_work, request, monkeypatch)
    shown = capfd.readouterr()
    assert WRONG[line] in f"{raised.value!r} {shown.out} {shown.err}"


def try_command(
    command: Command, reader: Reader, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Try a command; raises what it fails by."""
    words = [expanded(reader.real(word)) for word in command.words]
    match words:
        case ["dreambooth", "personalize", *arguments] | ["python", "pipelines/personalize.py", *arguments]:
            assert personalize.main([*arguments, "--dry-run"]) == 0
        case ["dreambooth", "evaluate", *arguments] | ["python", "pipelines/evaluate.py", *arguments]:
            monkeypatch.setattr(evaluate, "_carry_out", lambda *_: [])
            assert evaluate.main([*arguments, *reader.judges]) == 0
        case ["dreambooth", "serve", *arguments]:
            from serve import command as serving

            monkeypatch.setattr(serving, "_serve", lambda *_: 0)
            assert serving.main([*arguments, "--port", free_port()]) == 0
        case ["dreambooth", "keys", *arguments] | ["python", "-m", "serve.keys", *arguments]:
            from serve import keys

            assert keys.main(arguments) == 0
        case ["serve", "run", *arguments]:
            from ray.serve.scripts import run

            read = run.make_context("serve run", arguments).params
            assert read["config_or_import_path"] == "serve.app:app"
            app(ServeConfig.model_validate(dict(argument.split("=", 1) for argument in read["arguments"])))
        case ["serve", "deploy", *arguments]:
            from ray.serve.schema import ServeDeploySchema
            from ray.serve.scripts import deploy

            read = deploy.make_context("serve deploy", arguments).params
            [application] = ServeDeploySchema.model_validate(
                yaml.safe_load((ROOT / read["config_or_import_path"]).read_text())
            ).applications
            ServeConfig.model_validate(application.args)
        case ["ray", "job", "submit", *arguments]:
            from ray.dashboard.modules.job.cli import submit

            submit.make_context("ray job submit", arguments)
            try_command(inner(command), reader, request, monkeypatch)
        case ["curl", *arguments]:
            ask(arguments, request.getfixturevalue("server"))
        case ["make", target]:
            if not re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE):
                raise LookupError(f"the Makefile has no target {target}")
        case ["python", "-m", "dreambooth.embedded.build", *arguments]:
            tyro.cli(importlib.import_module("dreambooth.embedded.build.__main__").Options, args=arguments)
        case ["python", "-m", "pytest", path, "-k", _]:
            assert (ROOT / path).exists(), path
        case ["python", "-m", module, *arguments] if module.startswith(("tests.benchmarks.", "dreambooth.")):
            only_read(module, arguments, monkeypatch)
        case _:
            raise LookupError(f"no test knows what to do with {command}")


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


class Read(Exception):
    """The arguments are read."""


def only_read(module: str, arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a module read arguments by its own argparse parser, and stop there."""
    main: Callable[[], Any] = importlib.import_module(module).main
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser, *_: Any) -> None:
        parse(parser, list(arguments))
        raise Read

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(Read):
        main()


def ask(arguments: Sequence[str], server: str) -> None:
    """What curl does with a URL, `-H`, `-d` and `-N`; raises unless the answer is a success."""
    url, *rest = arguments if arguments[0] != "-N" else arguments[1:]
    headers, body = {}, None
    for option, value in zip(rest[::2], rest[1::2], strict=True):
        if option == "-d":
            body = value
        else:
            assert option == "-H", option
            name, _, text = value.partition(": ")
            headers[name] = text
    assert url.startswith("http://127.0.0.1:8000/"), url
    data = body.encode() if body is not None else None
    request = urllib.request.Request(url.replace("http://127.0.0.1:8000", server), data, headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = response.read().decode()
    if body is not None and not json.loads(body).get("stream"):
        images = json.loads(answer)
        assert images["warning"] is None
        assert len(images["data"]) == json.loads(body).get("n", 1)
    elif body is not None:
        assert "image_generation.completed" in answer
