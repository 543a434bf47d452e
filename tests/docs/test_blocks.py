"""YAML on the pages is read by what reads it, Python is run, and a manifest has the fields that the page says."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from dreambooth.subjects.manifest import load_manifest
from dreambooth.subjects.photos import load_subject
from pipelines.planning.options import parse
from tests.docs.conftest import Reader
from tests.docs.pages import Block, blocks, page


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_is_what_the_project_reads(block: Block, at_work: Reader) -> None:
    path = at_work.folder / f"block-{block.line}.yaml"
    path.write_text(at_work.real(block.text))
    if "subjects" in yaml.safe_load(block.text):
        for spec in load_manifest(path):
            assert spec.class_noun is not None
            assert load_subject(spec.name, spec.images, spec.class_noun).images
    else:
        assert parse(["--config", str(path)], "").as_dict()["steps"] == yaml.safe_load(block.text)["steps"]


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_runs(block: Block, at_work: Reader, request: pytest.FixtureRequest) -> None:
    text = at_work.real(block.text)
    if "http://127.0.0.1:8000" in text:
        text = text.replace("http://127.0.0.1:8000", request.getfixturevalue("server"))
    names: dict[str, Any] = {}
    exec(compile(text, str(block), "exec"), names)
    if "image" in names:
        assert names["image"].size == (32, 32)


def test_the_fields_of_a_manifest_are_on_the_page(reader: Reader) -> None:
    manifest = reader.store.versions("rex")[0].manifest
    cells = [token for row in page("docs/store-format.md").table("manifest.json") for token in row[0]]
    written = {token.content for token in cells if token.type == "code_inline"}
    assert written == manifest.keys() | {"form", "super_resolution", "upscaler"}
