"""Every option, field, endpoint, metric and message is on its page, and none that is not there any more."""

from __future__ import annotations

import ast
import re
from collections.abc import AsyncIterator
from dataclasses import fields
from pathlib import Path

import pytest
from markdown_it.token import Token

from dreambooth.backbones import FAMILIES
from dreambooth.common.location import Location
from dreambooth.store import SubjectStore
from pipelines.evaluate import EvaluateOptions
from pipelines.planning.options import Options
from serve import keys, metrics
from serve.api.auth import KeyFolder
from serve.api.image_files import ImageFiles
from serve.api.protocol import GeneratedImage, ImagesRequest, ImagesResponse
from serve.api.routes import ApiConfig, create_api
from serve.catalog.catalog import Catalog
from serve.config import ServeConfig
from serve.request import DrawnImage, GenerationRequest
from tests.conftest import ROOT
from tests.docs.pages import HANDBOOK, PAGES, page

PERSONALIZE = {option.name for group in fields(Options) for option in fields(group.default_factory)}  # type: ignore[arg-type]
EVALUATE = {option.name for option in fields(EvaluateOptions)}
KEYS = {"store", "keys", "tenant", "subjects", "images_per_minute", "largest_side", "admin"}
OF_OTHERS = {
    *("help", "help-all", "host", "port", "working-dir", "follow", "logdir", "from-file"),
    *("out", "small", "preset", "compile", "workers", "continue-from"),  # dreambooth.embedded.build and benchmarks
}
"""Options of other commands, and of these commands that no class holds."""


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def flags(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text))


@pytest.mark.parametrize(
    ("name", "options"),
    [("docs/training.md", PERSONALIZE), ("docs/evaluation.md", EVALUATE), ("docs/serving.md", KEYS)],
)
def test_every_option_is_on_its_page(name: str, options: set[str]) -> None:
    written = flags(" ".join(page(name).code))
    assert {flag(option) for option in options} - written == set()


def test_these_are_the_options_of_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        keys.main(["make", "--help"])
    assert flags(capsys.readouterr().out) == {flag(option) for option in KEYS} | {"--help"}


def test_every_field_of_the_server_is_on_its_page() -> None:
    cells = [row[0] for row in page("docs/serving.md").table("Options")]
    assert {code for cell in cells for code in codes(cell)} == set(ServeConfig.model_fields)


def test_no_page_names_an_option_that_is_not_there() -> None:
    known = {flag(name) for name in PERSONALIZE | EVALUATE | KEYS | set(ServeConfig.model_fields) | OF_OTHERS}
    unknown = {(str(one), option) for one in HANDBOOK for code in one.code for option in flags(code) - known}
    assert unknown == set()


def codes(cell: list[Token]) -> list[str]:
    return [token.content for token in cell if token.type == "code_inline"]


def text(cell: list[Token]) -> str:
    return "".join(token.content for token in cell)


def test_the_recipes_are_the_presets() -> None:
    names = {
        "Stable Diffusion": "stable-diffusion",
        "SDXL": "sdxl",
        "DeepFloyd IF I": "deepfloyd-if",
        "DeepFloyd IF II": "deepfloyd-if-ii",
    }
    written, family = {}, ""
    for cells in page("docs/training.md").table("Recipes by family and GPU"):
        first, machine, steps, rate, batch, offload, checkpointing = map(text, cells)
        family = names[first] if first else family
        written[family, machine] = (int(steps), float(rate), int(batch), offload, checkpointing == "yes")
    presets = {
        (family.family, machine): preset for family in FAMILIES for machine, preset in family.machine_presets.items()
    }
    assert written == {
        key: (one.steps, one.learning_rate, one.batch, one.offload, one.gradient_checkpointing)
        for key, one in presets.items()
    }
    assert {(one.precision, one.zero_stage) for one in presets.values()} == {("bf16", 2)}


def test_the_fields_of_requests_and_answers_are_on_the_page() -> None:
    serving = page("docs/serving.md")
    asked = {code for row in serving.table("POST /v1/images/generations") for code in codes(row[0])}
    assert asked == set(ImagesRequest.model_fields)
    answered = set(ImagesResponse.model_fields) - {"data"} | {f"data[].{name}" for name in GeneratedImage.model_fields}
    assert answered - set(serving.code) == set()


def test_every_endpoint_is_on_the_page(tmp_path: Path) -> None:
    folder = Location.of(tmp_path)
    api = create_api(Catalog(SubjectStore(folder)), no_draw, ApiConfig(KeyFolder(folder), ImageFiles(folder, 1.0)))
    routes = {(method.upper(), path) for path, methods in api.openapi()["paths"].items() for method in methods}
    assert len(routes) >= 6
    written = set()
    for row in page("docs/serving.md").table("Endpoints"):
        for endpoint in ", ".join(codes(row[0])).split(", "):
            method, path = endpoint.split()
            written.add((method, re.sub(r"/[A-Z]+$", "/{}", path)))
    assert written == {(method, re.sub(r"{.*}", "{}", path)) for method, path in routes}


async def no_draw(backbone: str, order: GenerationRequest) -> AsyncIterator[DrawnImage]:
    pytest.fail("this reached a replica")
    yield


def test_every_metric_is_on_the_page() -> None:
    names = {one.info["name"] for one in vars(metrics).values() if hasattr(one, "info")}
    assert len(names) == 7
    written = {re.sub(r"^ray_|_total$", "", code) for code in page("docs/serving.md").code}
    assert names - written == set()


# -- messages

_ANY = "\x00"


def _templates() -> list[str]:
    """All texts of the code, with a mark for what is put into them."""

    def template(node: ast.expr) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(template(value) for value in node.values)
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else _ANY

    sources = [path for package in ("dreambooth", "pipelines", "serve") for path in (ROOT / package).rglob("*.py")]
    nodes = [node for path in sources for node in ast.walk(ast.parse(path.read_text()))]
    return [template(node) for node in nodes if isinstance(node, ast.JoinedStr | ast.Constant)]


_PUT_IN = r"\b\d\w*\b|\b(?:bf16|adafactor|rex|images?)\b|GPU(?=s)|--batch|'[^']*'"
"""What stands on the page as an example of what the code puts in."""
_PUT_IN_ALONE = _PUT_IN.replace("(?=s)", "")


def _pattern(message: str) -> str:
    """What finds a message in the code; `...` is any text."""
    pattern = ""
    for part in re.split(rf"(\.\.\.|{_PUT_IN})", message):
        if part == "...":
            pattern += ".*"
        else:
            pattern += f"(?:{re.escape(part)}|{_ANY})" if re.fullmatch(_PUT_IN_ALONE, part) else re.escape(part)
    return pattern


FOREIGN = {"CUDA out of memory"}
"""Messages of others."""


def test_the_messages_that_are_explained_are_those_of_the_code() -> None:
    shown = page("docs/troubleshooting.md").text
    rows = [line.split("|")[1] for line in shown.splitlines() if line.startswith("| `")]
    messages = {message for cell in rows for message in re.findall(r"`([^`]+)`", cell)} - FOREIGN - {"warning"}
    assert len(messages) > 50
    templates = "\n".join(_templates())
    assert [message for message in sorted(messages) if not re.search(_pattern(message), templates)] == []
    assert not re.search(_pattern("the photo is not pretty"), templates)


def test_pages_name_no_place_of_a_machine() -> None:
    for one in PAGES:
        assert not re.search(r"/work/|/root/|/tmp/(?!ray)", one.text), one
