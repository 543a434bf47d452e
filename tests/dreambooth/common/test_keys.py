"""Content keys: every setting counts, and one that was added later only when it is not at its default."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from dreambooth.common.keys import key_form, later
from dreambooth.common.location import digest


@dataclass(frozen=True)
class Inner:
    steps: int = 3


@dataclass(frozen=True)
class Settings:
    name: str
    inner: Inner = field(default_factory=Inner)
    sizes: tuple[tuple[int, int], ...] = ((1, 2),)
    more: dict[str, Inner] = field(default_factory=dict)


@dataclass(frozen=True)
class GrownInner(Inner):
    rank: int = later(4)


@dataclass(frozen=True)
class GrownSettings(Settings):
    inner: Inner = field(default_factory=GrownInner)
    scale: float = later(1.0)
    own: GrownInner | None = later(None)


def key(value: object) -> str:
    return digest(key_form(value))


def test_without_later_settings_the_form_is_that_of_the_dataclass() -> None:
    settings = Settings("a", sizes=((1, 2), (3, 4)), more={"b": Inner(5)})
    assert key(settings) == digest(asdict(settings))


def test_a_setting_that_is_added_later_changes_no_key_at_its_default() -> None:
    assert key(GrownSettings("a")) == key(Settings("a"))


def test_a_setting_that_is_added_later_counts_when_it_is_set() -> None:
    grown = [
        GrownSettings("a", scale=2.0),
        GrownSettings("a", inner=GrownInner(rank=8)),
        GrownSettings("a", own=GrownInner()),
        GrownSettings("a", own=GrownInner(rank=8)),
    ]
    assert len({key(one) for one in [Settings("a"), *grown]}) == 5


def test_settings_within_a_later_one_follow_the_same_rule() -> None:
    assert key_form(GrownSettings("a", own=GrownInner(steps=7)))["own"] == {"steps": 7}
