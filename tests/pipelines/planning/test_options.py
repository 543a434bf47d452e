"""Options: typed, from the command line or a YAML file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from dreambooth.backbones import PRESETS
from dreambooth.methods import METHODS
from pipelines.planning.command_line import groups, in_words
from pipelines.planning.options import BY_BACKBONE, FIRST, Options, parse


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


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        parse(arguments, "Does it.\n\nAnd more.")
    assert exit_.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [80, 120])
def test_the_whole_help_names_every_option_in_groups(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = shown(capsys, "--help-all")
    assert re.findall(r"^  --([a-z-]+)", text, re.MULTILINE) == [
        option.name.replace("_", "-") for _, group in groups(Options) for option in group
    ]
    assert {option.name for _, group in groups(Options) for option in group} == Options().as_dict().keys()
    for heading in ("The subject", "The backbone", "Optimization", "Workers and memory", "The run"):
        assert f"\n{heading}:\n" in text
    assert "And more." in text
    assert "None" not in text
    assert max(map(len, text.splitlines())) <= columns


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_short_and_says_where_the_rest_is(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    text = shown(capsys, "--config", "nowhere.yaml", flag)
    assert re.findall(r"^  --([a-z-]+)", text, re.MULTILINE) == [name.replace("_", "-") for name in FIRST]
    assert f"These are 10 of {len(Options().as_dict())} options; --help-all shows all." in text
    assert "Does it." in text
    assert "And more." not in text
    assert "None" not in text


def test_help_tells_the_defaults_of_every_backbone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    words = " ".join(shown(capsys, "--help-all").split())
    for option, name in BY_BACKBONE.items():
        told = words.partition(f"--{option.replace('_', '-')} ")[2].partition("(default: ")[2].partition(")")[0]
        for backbone, preset in PRESETS.items():
            value = in_words(getattr(preset, name))
            assert re.search(rf"\b{backbone}(, [a-z-]+)* {re.escape(value)}(;|$)", told), (option, backbone)
    assert "by this machine" not in words
    assert "(default: bf16 on GPUs, fp32 on CPUs)" in words


def test_errors_say_nothing_of_none_either(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--precision", "int8"], ["--steps", "three"], ["--stepps", "3"], ["--zero-stage", "None"]):
        with pytest.raises(SystemExit):
            parse(arguments, "")
        error = capsys.readouterr().err
        assert arguments[0][:6] in error
        assert "None" not in error.replace("'None'", "")


def test_methods_are_those_that_are_registered(capsys: pytest.CaptureFixture[str]) -> None:
    assert f"--method {'|'.join(METHODS)}" in shown(capsys, "--help-all")
    settings = parse(["--method", "x", "--method-settings", "rank=8", "scale=0.5"], "").training
    assert settings.method_settings == ("rank=8", "scale=0.5")


def test_a_value_of_null_in_a_file_is_an_option_that_was_not_given(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("steps: null\nimages: [a]\n")
    assert parse(["--config", str(path)], "").training.steps is None
