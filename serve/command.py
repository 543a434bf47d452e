"""Serve the subjects of a store over HTTP, until Ctrl-C.

Everything is checked first; then Ray Serve runs in the foreground, until Ctrl-C or SIGTERM stops it.
Ray is joined where RAY_ADDRESS or a submitted job says so, or else started on this machine.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from serve.command_line import CommandLine
from serve.config import InvalidInput, ServeConfig, read_config

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from serve.catalog.catalog import Entry

_NAME = "dreambooth"
_VALUES = {int: "N", float: "X", str: "TEXT"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code: 0 stopped, 1 the server did not start, 2 bad input."""
    options = _command_line().parse_args(arguments)
    _quiet_libraries(options.verbose)
    try:
        config = read_config(_settings(options), _flag)
        return _serve(config, options, _check(config, options))
    except InvalidInput as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2


# -- the command line --------------------------------------------------------------------------------------------------


def _command_line() -> CommandLine:
    line = CommandLine(
        prog="dreambooth serve",
        usage="%(prog)s --store STORE [OPTIONS]",
        description="Serve the subjects of a store over HTTP, until Ctrl-C.",
    )
    line.add_argument(
        "--host", metavar="HOST", default="127.0.0.1", help="Address to listen on. (default: %(default)s)"
    )
    line.add_argument("--port", metavar="PORT", type=int, default=8000, help="Port. (default: %(default)s)")
    line.add_argument("--verbose", action="store_true", help="Show the logs of Ray here too.")
    for name, field in ServeConfig.model_fields.items():
        _add_setting(line, name, field)
    return line


def _add_setting(line: CommandLine, name: str, field: FieldInfo) -> None:
    text = (field.description or "").replace("\n", " ").replace("%", "%%")
    text = re.sub(r"`(\w+)`", lambda match: _flag(match[1]) if match[1] in ServeConfig.model_fields else match[0], text)
    if field.annotation is bool:
        line.add_argument(_flag(name), action="store_true", default=None, help=text)
    elif field.default == ():
        line.add_argument(_flag(name), metavar="NAME", nargs="*", help=text)
    else:
        if field.default is not None and not field.is_required():
            text += f" (default: {field.default:{'g' if isinstance(field.default, float) else ''}})"
        line.add_argument(_flag(name), metavar=_value(field.annotation), help=text)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _value(kind: Any) -> str:
    """What stands for a value of this type: a word, or its choices."""
    inner = [one for one in get_args(kind) if one is not type(None)]
    return _VALUES.get(kind) or "|".join(_VALUES.get(one) or "|".join(get_args(one)) for one in inner)


def _settings(options: Namespace) -> dict[str, Any]:
    given = {name: getattr(options, name) for name in ServeConfig.model_fields}
    return {name: value for name, value in given.items() if value is not None}


# -- checks ------------------------------------------------------------------------------------------------------------


def _check(config: ServeConfig, options: Namespace) -> list[Entry]:
    """The versions to serve; raises InvalidInput for all that would keep the server from starting."""
    from serve.preflight import check_port, check_reach, find_versions

    if not 0 < options.port < 2**16:
        raise InvalidInput(f"--port is {options.port}: a port is a number from 1 to {2**16 - 1}")
    check_reach(config, options.host, "leave --host out")
    if not _joins_a_cluster():
        check_port(options.host, options.port)
    return find_versions(config)


def _joins_a_cluster() -> bool:
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ or os.environ.get("RAY_ADDRESS", "local") != "local"


# -- the server --------------------------------------------------------------------------------------------------------


def _serve(config: ServeConfig, options: Namespace, versions: Sequence[Entry]) -> int:
    import ray
    from ray import serve

    from serve.app import build_application
    from serve.preflight import check_resources

    application = build_application(config, versions)
    with _output_to_file(options.verbose) as (log, say):
        try:
            context = ray.init(
                # Left to itself Ray also tries the cluster last started here, and waits for minutes when it is gone.
                address=None if _joins_a_cluster() else "local",
                namespace="serve",
                log_to_driver=options.verbose,
                logging_level="INFO" if options.verbose else "ERROR",
                runtime_env=_code_to_ship(),
            )
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, instead of Ray's own handler
            if not _joins_a_cluster():
                check_resources(config, len({entry.backbone for entry in versions}), ray.cluster_resources())
            say(f"starting; logs are in {context.address_info['session_dir']}/logs and {log}")
            serve.start(http_options={"host": options.host, "port": options.port})
            try:
                serve.run(application, name=_NAME)
                say(_welcome(config, options, versions))
                threading.Event().wait()
            finally:
                serve.delete(_NAME) if _joins_a_cluster() else serve.shutdown()
        except KeyboardInterrupt:
            say("stopped")
        except (RuntimeError, ConnectionError, TimeoutError) as error:
            say(f"error: the server did not start: {error}")
            return 1
        finally:
            ray.shutdown()
    return 0


def _welcome(config: ServeConfig, options: Namespace, versions: Sequence[Entry]) -> str:
    subjects = sorted({entry.subject for entry in versions})
    host = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
    address = f"http://{f'[{host}]' if ':' in host else host}:{options.port}"
    key = "" if config.without_keys else ' -H "Authorization: Bearer KEY"'
    body = shlex.quote(f'{{"model": "{subjects[0]}", "prompt": "a {{subject}} in the snow"}}')
    return "\n".join(
        [
            f"serving {_count(subjects, 'subject')} in {_count(versions, 'version')} at {address}",
            f"  docs  {address}/docs",
            f"  try   curl {address}/v1/images/generations{key} \\",
            f'          -H "Content-Type: application/json" -d {body}',
            "Ctrl-C stops the server",
        ]
    )


def _count(things: Sequence[object], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def _code_to_ship() -> dict[str, Any] | None:
    """The packages, when the nodes of a cluster may lack them; a submitted job brings its working directory."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ or not _joins_a_cluster():
        return None
    here = Path(__file__).parent
    return {"py_modules": [str(here), str(here.parent / "dreambooth")]}


# -- quiet -------------------------------------------------------------------------------------------------------------


def _quiet_libraries(verbose: bool) -> None:
    """Keep the notices of libraries off the terminal; before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    if not verbose:
        for name in ("ray", "ray.serve"):
            logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def _output_to_file(verbose: bool) -> Iterator[tuple[str, Callable[[str], None]]]:
    """Send what Ray's Python and native parts print to a file; gives its name, and a function that prints all the same.

    With `verbose` nothing is redirected.
    """
    if verbose:
        yield "this terminal", functools.partial(print, flush=True)
        return
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {number: os.dup(number) for number in (1, 2)}
    file, path = tempfile.mkstemp(prefix="dreambooth-serve-", suffix=".log")
    for number in kept:
        os.dup2(file, number)
    os.close(file)
    try:
        with open(kept[1], "w", closefd=False) as terminal:
            yield path, functools.partial(print, file=terminal, flush=True)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, terminal_number in kept.items():
            os.dup2(terminal_number, number)
            os.close(terminal_number)


if __name__ == "__main__":
    sys.exit(main())
