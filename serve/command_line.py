"""The style of the server's commands: plain help, and for a mistake one line `error: ...` and exit code 2."""

from __future__ import annotations

import argparse
import shutil
import sys
from itertools import pairwise
from typing import Any, NoReturn

from serve.config import nearest


class CommandLine(argparse.ArgumentParser):
    """An argument parser that reports a mistake in one line, and names the nearest option."""

    def __init__(self, **options: Any) -> None:
        """Take argparse's own options; on the command line nothing can be abbreviated."""
        super().__init__(allow_abbrev=False, formatter_class=_formatter, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, but exit for an unknown argument: a subcommand alone knows its own options."""
        given = sys.argv[1:] if args is None else list(args)
        for before, argument in pairwise(["", *given]):
            name, has_value, value = argument.partition("=")
            if has_value and not before.startswith("-") and _flag(name) in self._option_string_actions:
                self.error(f"unknown argument {argument}: write {_flag(name)} {value}")
        found, unknown = super().parse_known_args(given, namespace)
        if unknown and unknown[0].startswith("-"):
            name = unknown[0].partition("=")[0]
            options = [option for option in self._option_string_actions if option.startswith("--")]
            self.error(f"unknown argument {name}: {nearest(name, options)}")
        if unknown:
            self.error(f"unknown argument {unknown[0]}: `{self.prog} --help` shows what there is")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Print the message and exit."""
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _formatter(prog: str) -> argparse.HelpFormatter:
    width = min(shutil.get_terminal_size((100, 24)).columns, 110)
    return argparse.HelpFormatter(prog, max_help_position=28, width=width)
