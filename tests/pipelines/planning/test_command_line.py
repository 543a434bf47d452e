"""Command lines that are dataclasses: what help shows of them, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
import tyro

from pipelines.planning.command_line import groups, in_words, read_arguments, show_help_if_asked, shown


@dataclass(frozen=True)
class Size:
    """The size."""

    width: Annotated[int | None, shown("the paper's", "PIXELS")] = None
    """How wide
    it is."""
    ratio: float = 1.0
    """Of the sides."""


@dataclass(frozen=True)
class Look(Size):
    """The look."""

    colours: Annotated[tuple[str, ...], shown("")] = ()
    """What it is painted in."""
    kind: Annotated[Literal["matt", "gloss"] | None, shown("")] = None
    """How it shines."""
    thick: bool = False
    """Twice the paint."""
    twice: Annotated[bool | None, shown("by the weather")] = None
    """Two coats."""


@dataclass(frozen=True)
class Painting:
    """All."""

    look: Annotated[Look, tyro.conf.OmitArgPrefixes] = field(default_factory=Look)


def test_options_stand_with_the_class_that_declares_them() -> None:
    found = {heading: [option.name for option in options] for heading, options in groups(Painting)}
    assert found == {"The look:": ["colours", "kind", "thick", "twice"], "The size:": ["width", "ratio"]}


def test_help_shows_values_texts_and_defaults(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/paint.py"])
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit) as exit_:
        show_help_if_asked(Painting, ["--ratio", "2", "--help-all"], "Paints it.\n\nTwice.", ["width"])
    assert exit_.value.code == 0
    assert (
        capsys.readouterr().out
        == """usage: paint.py [OPTIONS]

Paints it.

Twice.

The look:
  --colours TEXT ...        What it is painted in.
  --kind matt|gloss         How it shines.
  --thick                   Twice the paint.
  --twice True|False        Two coats. (default: by the
                            weather)

The size:
  --width PIXELS            How wide it is. (default: the
                            paper's)
  --ratio X                 Of the sides. (default: 1)
"""
    )
    with pytest.raises(SystemExit):
        show_help_if_asked(Painting, ["-h"], "Paints it.\n\nTwice.", ["width"])
    assert (
        capsys.readouterr().out
        == """usage: paint.py [OPTIONS]

Paints it.

The options of a first run:
  --width PIXELS            How wide it is. (default: the
                            paper's)

These are 1 of 6 options; --help-all shows all.
"""
    )
    show_help_if_asked(Painting, ["--ratio", "2"], "", ["width"])
    assert capsys.readouterr().out == ""


def test_a_default_that_is_none_must_be_told_in_words() -> None:
    @dataclass(frozen=True)
    class Untold:
        """Untold."""

        width: int | None = None
        """How wide it is."""

    with pytest.raises(AssertionError, match="width"):
        list(groups(Untold))


def test_arguments_are_read_into_the_dataclass() -> None:
    arguments = ["--width", "3", "--colours", "red", "blue", "--kind", "matt", "--thick", "--twice", "False"]
    assert read_arguments(Painting, arguments) == Painting(Look(3, 1.0, ("red", "blue"), "matt", True, False))
    assert read_arguments(Painting, []) == Painting()
    assert read_arguments(Painting, ["--thick", "--no-thick"]) == Painting()


@pytest.mark.parametrize("arguments", [["--width", "None"], ["--kind", "None"], ["--twice", "None"]])
def test_nobody_writes_none(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        read_arguments(Painting, arguments)
    assert exit_.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "words"),
    [(True, "yes"), (1e-6, "1e-06"), (2.0, "2"), (150, "150"), (("a", 0.5), "a 0.5"), ("all", "all"), ((), "")],
)
def test_values_in_words(value: object, words: str) -> None:
    assert in_words(value) == words
