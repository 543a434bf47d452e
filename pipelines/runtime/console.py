"""What a person sees: one line of progress for each part of the work, on a terminal or in a job's log."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

_SECONDS_BETWEEN_LINES = 10.0


def quiet_libraries() -> None:
    """Keep the notices of the libraries below off the terminal. Call it before they are imported.

    Warnings that Python was asked for, as by `python -W`, are still given.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", append=True)
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed sets its logger's level when it is imported.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


class ProgressLine:
    """A part of the work: counts what is done, and tells rate, time left and a note."""

    def __init__(self, display: Display, name: str, total: int, unit: str, done: int) -> None:
        """Begin with `done` of `total` already there from before."""
        self._display, self._name, self._total, self._unit = display, name, total, unit
        self._done = done
        self._note = ""
        self._first: tuple[float, int] | None = None  # when work was first seen done: start-up does not count
        self._printed = 0.0
        self._task: TaskID | None = None
        if display.bars is not None:
            self._task = display.bars.add_task(name, total=total, completed=done, text=self._text())
        else:
            self._print()

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count work that is done."""
        self.reach(self._done + count, note)

    def reach(self, done: int, note: str | None = None) -> None:
        """Set how much is done."""
        self._done = done
        self._first = self._first or (time.monotonic(), done)
        self._note = self._note if note is None else note
        if self._display.bars is not None and self._task is not None:
            self._display.bars.update(self._task, completed=done, text=self._text())
        elif time.monotonic() - self._printed >= _SECONDS_BETWEEN_LINES:
            self._print()

    def close(self) -> None:
        """Show the final state."""
        if self._display.bars is not None and self._task is not None:
            self._display.bars.update(self._task, text=self._text())
        else:
            self._print()

    def _text(self) -> str:
        parts = [f"{self._done}/{self._total} {self._unit}"]
        began, found = self._first or (time.monotonic(), self._done)
        elapsed, fresh = time.monotonic() - began, self._done - found
        if fresh > 0 and elapsed > 0:
            rate = fresh / elapsed
            parts.append(f"{rate:.2f} {self._unit}/s" if rate >= 0.1 else f"{1 / rate:.1f} s each")
            if self._done < self._total:
                parts.append(f"{timedelta(seconds=round((self._total - self._done) / rate))} left")
        return "  ".join([*parts, self._note] if self._note else parts)

    def _print(self) -> None:
        self._printed = time.monotonic()
        self._display.say(f"{self._name:<14} {self._text()}")


class Display:
    """Shows progress as bars on a terminal, and as a line now and then elsewhere."""

    def __init__(self) -> None:
        """Write to standard output."""
        self._console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self.bars: Progress | None = None
        if self._console.is_terminal:
            self.bars = Progress(
                TextColumn("{task.description:<14}"),
                BarColumn(24),
                TextColumn("{task.fields[text]}"),
                console=self._console,
            )

    def __enter__(self) -> Display:
        """Start drawing."""
        if self.bars is not None:
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop drawing and leave the last state on the screen."""
        if self.bars is not None:
            self.bars.stop()

    def say(self, text: str = "") -> None:
        """Print a line above the bars."""
        self._console.print(text, markup=False)
        self._console.file.flush()

    @contextmanager
    def progress(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[ProgressLine]:
        """Show the progress of a part of the work while the block runs."""
        progress = ProgressLine(self, name, total, unit, done)
        try:
            yield progress
        finally:
            progress.close()
