"""Settings of a method's own, from texts."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from dreambooth.methods import METHODS, find_method
from dreambooth.methods.base import parse_settings
from dreambooth.methods.dreambooth import DreamBooth


@dataclass(frozen=True)
class Own:
    rank: int = 4
    scale: float = 1.0
    name: str = "a"
    fast: bool = False


class WithSettings(DreamBooth):
    name = "with-settings"
    settings_kind = Own


def test_what_is_not_given_is_at_its_default() -> None:
    assert parse_settings(WithSettings(), ()) == Own()
    assert parse_settings(WithSettings(), ("rank=8", "scale=2", "fast=true")) == Own(8, 2.0, fast=True)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("rank", "takes NAME=VALUE, not 'rank'"),
        ("range=8", "with-settings has no setting 'range'; its settings are rank, scale, name, fast"),
        ("rank=many", "rank is of type int"),
        ("rank=1.5", "rank is of type int"),
        ("fast=1", "fast is of type bool"),
    ],
)
def test_a_wrong_setting_is_named(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_settings(WithSettings(), (text,))


@pytest.mark.parametrize("name", METHODS)
def test_methods_without_settings_take_none(name: str) -> None:
    assert parse_settings(METHODS[name], ()) is None
    with pytest.raises(ValueError, match=f"{name} has no setting 'rank'; it has none of its own"):
        parse_settings(METHODS[name], ("rank=8",))


def test_an_unknown_method_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="nearest is 'textual-inversion' of dreambooth, textual-inversion"):
        find_method("text-inversion")
