"""Command lines that are dataclasses: read by tyro, with a short help page and a whole one."""

from __future__ import annotations

import ast
import inspect
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import pairwise
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
from rich.console import Console
from rich.text import Text
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

T = TypeVar("T")

_REGISTRY = ConstructorRegistry()
_WORDS = {int: "N", float: "X", str: "TEXT", bool: "True|False"}
_COLUMN = 28
"""Where the texts of options begin."""


def shown(default: str | None = None, value: str | None = None) -> Any:
    """How help shows an option, as an annotation: its default in words ("" for none), and what stands for its value."""
    return tyro.conf.arg(metavar=value, help_behavior_hint=f"(default: {default})" if default else default)


@_REGISTRY.primitive_rule
def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Read `T | None` as T: None stands for an option that was not given, and nobody writes it."""
    inner = [one for one in get_args(info.type) if one is not NoneType]
    if get_origin(info.type) not in (Union, UnionType) or len(inner) != 1:
        return None
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(inner[0], info.markers))
    if not isinstance(spec, PrimitiveConstructorSpec):
        return None
    return PrimitiveConstructorSpec(
        nargs=spec.nargs,
        metavar=spec.metavar,
        instance_from_str=spec.instance_from_str,
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: [] if value is None else spec.str_from_instance(value),
        choices=spec.choices,
    )


def read_arguments(kind: type[T], arguments: Sequence[str]) -> T:
    """The options that `arguments` give; prints what is wrong with them and exits with 2."""
    config = (tyro.conf.OmitArgPrefixes,)
    return tyro.cli(kind, args=arguments, prog=_program(), config=config, registry=_REGISTRY)


def _program() -> str:
    return os.path.basename(sys.argv[0])


# -- help --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """An option as help shows it."""

    name: str
    """That of its field."""
    value: str
    """What stands for its value; empty for a flag."""
    text: str
    default: str
    """In words; empty for a flag, and where the text says it all."""

    @property
    def flag(self) -> str:
        """What is written on the command line."""
        return "--" + self.name.replace("_", "-")


def groups(kind: type) -> Iterator[tuple[str, list[Option]]]:
    """The options of a dataclass and of those within it, by the class that declares them, which gives the heading."""
    hints = get_type_hints(kind, include_extras=True)
    defaults = {field.name: field.default for field in fields(kind)}
    for declaring in kind.__mro__:
        names = [name for name in inspect.get_annotations(declaring) if name in defaults]
        inner: list[Any] = [one for one in (_unwrapped(hints[name])[0] for name in names) if is_dataclass(one)]
        if inner:
            for one in inner:
                yield from groups(one)
        elif names:
            texts = _field_docstrings(declaring)
            found = [_option(name, hints[name], defaults[name], texts[name]) for name in names]
            yield (declaring.__doc__ or "").removesuffix(".") + ":", found


def show_help_if_asked(kind: type, arguments: Sequence[str], description: str, first: Sequence[str]) -> None:
    """For `--help` print the options that are named `first`, for `--help-all` all of them, and exit with 0."""
    if "--help-all" in arguments:
        _print_help(groups(kind), description)
    elif {"-h", "--help"} & set(arguments):
        options = {option.name: option for _, group in groups(kind) for option in group}
        footer = f"These are {len(first)} of {len(options)} options; --help-all shows all."
        found = [options[name] for name in first]
        _print_help([("The options of a first run:", found)], description.partition("\n\n")[0], footer)
    else:
        return
    raise SystemExit(0)


def _print_help(shown: Iterable[tuple[str, list[Option]]], description: str, footer: str = "") -> None:
    width = page_width()
    lines = [f"usage: {_program()} [OPTIONS]"]
    for paragraph in description.strip().split("\n\n"):
        lines += ["", *textwrap.wrap(" ".join(paragraph.split()), width)]
    for heading, options in shown:
        lines += ["", heading]
        for option in options:
            lines += _option_lines(option, width)
    console = Console(file=sys.stdout, soft_wrap=True)
    for line in [*lines, *(["", footer] if footer else [])]:
        text = Text(line)
        text.highlight_regex(r"^  --[a-z-]+|^[A-Z][^.]*:$", "bold")
        console.print(text)


def _option_lines(option: Option, width: int) -> Iterator[str]:
    call = f"  {option.flag} {option.value}".rstrip()
    text = f"{option.text} (default: {option.default})" if option.default else option.text
    indent = " " * _COLUMN
    wrapped = textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )
    if len(call) + 2 > _COLUMN:
        yield call
    else:
        wrapped[0] = call.ljust(_COLUMN) + wrapped[0].lstrip()
    yield from wrapped


def _option(name: str, hint: Any, default: Any, text: str) -> Option:
    kind, metadata = _unwrapped(hint)
    told = next((one for one in metadata if isinstance(one, type(shown()))), shown())
    if kind is bool:
        return Option(name, "", text, "")
    assert default is not None or told.help_behavior_hint is not None, f"{name}: say in words what its default is"
    words = in_words(default) if told.help_behavior_hint is None else told.help_behavior_hint
    return Option(name, told.metavar or _value(kind), text, words.removeprefix("(default: ").removesuffix(")"))


def _unwrapped(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    return (get_args(hint)[0], hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())


def _value(kind: Any) -> str:
    """What stands for a value of this type: its choices, or a word."""
    if get_origin(kind) is tuple:
        return f"{_value(get_args(kind)[0])} ..."
    if get_origin(kind) in (Union, UnionType):
        return "|".join(_value(one) for one in get_args(kind) if one is not NoneType)
    return "|".join(map(str, get_args(kind))) or _WORDS[kind]


def page_width() -> int:
    """Characters in a line: the terminal's as far as it is easy to read, and a wide page's elsewhere."""
    return min(shutil.get_terminal_size((110, 24)).columns, 110)


def in_words(value: Any) -> str:
    """A setting's value as a person reads it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return " ".join(map(in_words, value)) if isinstance(value, tuple | list) else str(value)


def _field_docstrings(declaring: type) -> dict[str, str]:
    """The text below each field of a class."""
    [tree] = ast.parse(textwrap.dedent(inspect.getsource(declaring))).body
    assert isinstance(tree, ast.ClassDef)
    return {
        field.target.id: " ".join(str(below.value.value).split())
        for field, below in pairwise(tree.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
    }
