"""What a person sees of the work: how much is done, how fast, and how long the rest takes."""

from __future__ import annotations

import contextlib
import logging
import warnings

import pytest

from pipelines.runtime import console
from pipelines.runtime.console import Display, quiet_libraries


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which a test sets."""
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_a_line_tells_count_rate_time_left_and_note(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Display().progress("fine-tune", 100, "steps", done=10) as line:
        line.reach(20)  # the first work that is seen: start-up has no part in the rate
        clock[0] += 15
        line.reach(50, note="loss 0.1")
        clock[0] += 1
        line.reach(51)  # too soon for another line
    first, middle, last = capsys.readouterr().out.splitlines()
    assert first.split() == ["fine-tune", "10/100", "steps"]
    assert middle.split("  ")[-4:] == ["50/100 steps", "2.00 steps/s", "0:00:25 left", "loss 0.1"]
    assert "51/100 steps" in last


def test_slow_work_is_told_in_seconds(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Display().progress("sample", 3, "images") as line:
        line.advance()
        clock[0] += 40
        line.advance()
    assert "2/3 images  40.0 s each  0:00:40 left" in capsys.readouterr().out


def test_what_failed_midway_shows_how_far_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(OSError), Display().progress("encode", 2, "subjects") as line:
        line.advance()
        raise OSError("disk")
    assert capsys.readouterr().out.splitlines()[-1].split() == ["encode", "1/2", "subjects"]


def test_notices_of_libraries_are_kept_off_and_their_errors_are_not(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():
        quiet_libraries()
    for name in ("ray", "ray.data", "ray.train", "DeepSpeed"):
        logging.getLogger(name).propagate = True
        logging.getLogger(name).warning("a notice")
        logging.getLogger(name).error("an error")
    assert {record.message for record in caplog.records} == {"an error"}
