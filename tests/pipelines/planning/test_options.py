"""Options: typed, from the command line or a YAML file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipelines.planning.options import Options, parse


def test_without_arguments_all_options_have_defaults() -> None:
    assert parse([], "") == Options()


def test_a_file_gives_options_and_the_command_line_wins(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("steps: 12\nlearning-rate: 5e-6\nimages: [a, b]\nverbose: true\nzero_stage: 3\noffload: none\n")
    options = parse(["--config", str(path), "--steps", "7", "--no-verbose"], "")
    assert options.training.steps == 7
    assert options.training.learning_rate == 5e-6
    assert options.subject.images == ("a", "b")
    assert options.cluster.zero_stage == 3
    assert not options.run.verbose


def test_what_a_run_records_of_its_options_is_a_file_that_gives_them_again(tmp_path: Path) -> None:
    options = parse(["--images", "x", "--class-noun", "dog", "--prior-weight", "0.5", "--workers", "3"], "")
    path = tmp_path / "again.yaml"
    recorded = {key: list(value) if isinstance(value, tuple) else value for key, value in options.as_dict().items()}
    del recorded["config"]
    path.write_text(yaml.safe_dump(recorded))
    assert parse(["--config", str(path)], "").as_dict() | {"config": None} == options.as_dict()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stepps: 3", "unknown key 'stepps'; the nearest valid one is 'steps'"),
        ("learning_rat: 3", "the nearest valid one is 'learning_rate'"),
        ("- steps", "expected a mapping of options to values, found list"),
        ("steps: [", "--config"),
    ],
)
def test_a_file_with_a_mistake_is_an_error_that_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(SystemExit) as exit_:
        parse([f"--config={path}"], "")
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(path) in error


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--stepps", "3"], "--steps"),
        (["--steps", "three"], "--steps"),
        (["--zero-stage", "4"], "--zero-stage"),
        (["--precision", "int8"], "--precision"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(
    capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(arguments, "")
    assert exit_.value.code == 2
    assert named in capsys.readouterr().err


def test_help_names_every_option_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(["--help"], "")
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for name in Options().as_dict():
        assert f"--{name.replace('_', '-')}" in text
    for group in ("subject", "model", "prior", "training", "cluster", "samples", "run"):
        assert f"{group} options" in text
