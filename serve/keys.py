"""Make, list and revoke the keys of a server."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence

from serve.api.auth import folder_of
from serve.command_line import CommandLine


def _make(options: Namespace) -> None:
    limits = {"images_per_minute": options.images_per_minute, "largest_side": options.largest_side}
    for name, value in limits.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
    if not options.subjects and not options.admin:
        raise ValueError("a key without subjects can do nothing: name some with --subjects, or make it --admin")
    folder = folder_of(options.store, options.keys)
    secret, _ = folder.make(options.tenant, tuple(options.subjects), admin=options.admin, **limits)
    print(secret)


def _list(options: Namespace) -> None:
    for key in folder_of(options.store, options.keys).all():
        rate = f"{key.images_per_minute} images a minute" if key.images_per_minute else "no rate limit"
        side = f", sides to {key.largest_side}" if key.largest_side else ""
        what = "admin" if key.admin else " ".join(key.subjects)
        print(f"{key.id}  {key.created}  {key.tenant}: {what} ({rate}{side})")


def _revoke(options: Namespace) -> None:
    folder_of(options.store, options.keys).revoke(options.key_id)


def _command_line() -> CommandLine:
    line = CommandLine(prog="dreambooth keys", description="Make, list and revoke the keys of a server.")
    commands = line.add_subparsers(title="commands", metavar="COMMAND", required=True)
    make, show, revoke = (
        commands.add_parser(name, help=text, description=text)
        for name, text in (
            ("make", "Make a key and print it: it cannot be shown again."),
            ("list", "List the keys by id, with what they may do."),
            ("revoke", "Revoke a key; servers notice within half a minute."),
        )
    )
    for command, run in ((make, _make), (show, _list), (revoke, _revoke)):
        command.set_defaults(run=run)
        command.add_argument("--store", metavar="STORE", required=True, help="the subject store")
        command.add_argument("--keys", metavar="FOLDER", help="the folder of keys (default: STORE/keys)")
    make.add_argument("--tenant", metavar="NAME", required=True, help="whose key it is")
    make.add_argument(
        "--subjects",
        metavar="NAME",
        nargs="*",
        default=[],
        help="the tenant's subjects: names, or patterns such as 'acme-*'",
    )
    make.add_argument("--images-per-minute", metavar="N", type=int, help="the key's rate (default: no limit)")
    make.add_argument(
        "--largest-side",
        metavar="PIXELS",
        type=int,
        help="the longest side of an image (default: the model's own limit)",
    )
    make.add_argument("--admin", action="store_true", help="see every subject, and list and revoke keys over HTTP")
    revoke.add_argument("key_id", metavar="ID", help="the id that `list` shows")
    return line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code: 0, or 2 for bad input."""
    options = _command_line().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
