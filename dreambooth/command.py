"""The console command: `dreambooth COMMAND ...` runs one of those that the project's parts register."""

from __future__ import annotations

import ast
import difflib
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec

GROUP = "dreambooth.commands"
"""Entry points of commands: functions that take arguments and return an exit code."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, or list them; returns the exit code."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    commands = {command.name: command for command in entry_points(group=GROUP)}
    if not commands:
        print("error: no commands are registered: install the project, pip install -e .", file=sys.stderr)
        return 2
    if name in ("-h", "--help"):
        print("\n".join(_help(commands)))
        return 0
    if name not in commands:
        nearest = difflib.get_close_matches(name, commands, n=1, cutoff=0.0)
        meant = f": did you mean {nearest[0]!r}?" if nearest else ""
        print(f"error: unknown command {name!r}{meant} `dreambooth --help` lists the commands", file=sys.stderr)
        return 2
    # What usage lines and errors call the program.
    sys.argv = [f"dreambooth {name}", *rest]
    code: int = commands[name].load()(rest)
    return code


def _help(commands: dict[str, EntryPoint]) -> Iterator[str]:
    yield "usage: dreambooth COMMAND [OPTIONS]"
    yield ""
    yield "Personalized text-to-image models, from photos to a server."
    yield ""
    for name in commands:
        yield f"  {name:14}{_summary(commands[name].module)}"
    yield ""
    yield "dreambooth COMMAND --help shows the options of a command."


def _summary(module: str) -> str:
    """The first line of a module's docstring, read without importing what the module imports."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no module {module}, which a command of {GROUP} names", name=module)
    with open(spec.origin, encoding="utf-8") as source:
        return (ast.get_docstring(ast.parse(source.read())) or "").partition("\n")[0]
