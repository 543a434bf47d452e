"""The settings: texts from a command line are read, and the first mistake is told in one line."""

from __future__ import annotations

import pytest

from serve.config import InvalidInput, ServeConfig, read_config


def test_texts_of_a_command_line_are_read() -> None:
    config = read_config({"store": "s", "replicas": "0", "max_replicas": "4", "without_keys": "true", "escape": "2.5"})
    assert (config.replicas, config.max_replicas, config.without_keys, config.escape) == (0, 4, True, 2.5)


@pytest.mark.parametrize("keep", ["mug,dog@1", ["mug,dog@1"], ["mug", "dog@1"], ("mug", "dog@1")])
def test_several_names_can_be_given(keep: object) -> None:
    assert read_config({"store": "s", "keep": keep}).keep == ("mug", "dog@1")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replica": "2"}, "unknown argument replica: the nearest valid one is replicas"),
        ({"replicas": "two"}, "replicas is 'two': input should be a valid integer"),
        ({"replicas": "0"}, "replicas is 0, so nothing would ever be drawn: give max_replicas too"),
        ({"replicas": "3", "max_replicas": "2"}, "max_replicas is 2, less than replicas"),
        ({"public_url": "example.org"}, "public_url is 'example.org': string should match"),
    ],
)
def test_a_mistake_is_named(settings: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidInput, match=r"^[^\n]+$") as caught:
        read_config({"store": "s", **settings})
    assert message in str(caught.value)


def test_every_setting_has_a_text() -> None:
    assert all(field.description for field in ServeConfig.model_fields.values())
