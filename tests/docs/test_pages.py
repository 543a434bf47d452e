"""Pages are short, can be found from the README, and lead where they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.docs.pages import HANDBOOK, PAGES, Page, page

LANGUAGES = {"sh", "python", "yaml", "text"}


def broken(one: Page) -> list[str]:
    """The links of a page, within the project, that lead nowhere."""
    found = []
    for link in one.links:
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (one.path.parent / path).resolve() if path else one.path
        if not target.exists() or (anchor and anchor not in Page(target).anchors):
            found.append(link)
    return found


@pytest.mark.parametrize("one", PAGES, ids=str)
def test_links_lead_somewhere(one: Page) -> None:
    assert broken(one) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One `code` heading, and more\n# Twice\n# Twice\n")
    links = ["other.md#one-code-heading-and-more", "other.md#twice-1", "#here", "https://example.org/x"]
    wrong = ["missing.md", "other.md#one", "other.md#twice-2", "missing.png", "#there"]
    text = "# Here\n" + "\n".join(f"[link]({link})" for link in [*links, *wrong[:3], wrong[4]]) + "\n![](missing.png)"
    (tmp_path / "page.md").write_text(text)
    assert sorted(broken(Page(tmp_path / "page.md"))) == sorted(wrong)


@pytest.mark.parametrize("one", HANDBOOK, ids=str)
def test_pages_are_short(one: Page) -> None:
    lines = len(one.text.splitlines())
    assert lines <= (150 if str(one) == "README.md" else 200)


def test_the_readme_leads_to_every_page() -> None:
    targets = {link.partition("#")[0] for link in page("README.md").links}
    assert {str(one) for one in HANDBOOK} - {"README.md"} <= targets
    assert {"CONTRIBUTING.md", "CHANGELOG.md"} <= targets


@pytest.mark.parametrize("one", PAGES, ids=str)
def test_every_block_has_a_language_that_is_tested(one: Page) -> None:
    assert {block.language for block in one.blocks} <= LANGUAGES


@pytest.mark.parametrize("one", PAGES, ids=str)
def test_files_and_folders_that_are_named_are_there(one: Page) -> None:
    top = "|".join(("dreambooth", "pipelines", "serve", "cluster", "tests", "docs"))
    named = [code for code in one.code if re.fullmatch(rf"({top})/[\w./-]*", code) and "NAME" not in code]
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.svg")), ids=lambda path: path.name)
def test_drawings_say_in_words_what_they_show(path: Path) -> None:
    text = path.read_text()
    assert re.search(r"<title.*>.+</title>", text)
    assert re.search(r"<desc.*>.+</desc>", text)
    assert "<script" not in text
