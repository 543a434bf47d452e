"""The project's pages as the tests see them: headings, links, code spans, code blocks, tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.conftest import ROOT


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    page: Page
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        """Where it is, for the name of a test."""
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Page:
    """A page of Markdown."""

    path: Path

    def __str__(self) -> str:
        """The path from the root of the project."""
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def text(self) -> str:
        return self.path.read_text()

    @cached_property
    def _tokens(self) -> list[Token]:
        return MarkdownIt("commonmark").enable("table").parse(self.text)

    def _inline(self) -> Iterator[Token]:
        for token in self._tokens:
            yield from token.children or ()

    @cached_property
    def anchors(self) -> set[str]:
        """The anchors that GitHub gives to the headings."""
        seen: Counter[str] = Counter()
        found = set()
        for before, token in zip(self._tokens, self._tokens[1:], strict=False):
            if before.type == "heading_open":
                plain = "".join(child.content for child in token.children or ())
                slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
                found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
                seen[slug] += 1
        return found

    @property
    def links(self) -> list[str]:
        """Where its links lead and its images lie."""
        found = [token.attrGet("href") or token.attrGet("src") for token in self._inline()]
        return [str(link) for link in found if link]

    @cached_property
    def code(self) -> list[str]:
        """Its code spans."""
        return [token.content for token in self._inline() if token.type == "code_inline"]

    @property
    def blocks(self) -> list[Block]:
        return [
            Block(self, (token.map or [0])[0] + 1, token.info.strip(), token.content)
            for token in self._tokens
            if token.type == "fence"
        ]

    def table(self, heading: str) -> list[list[list[Token]]]:
        """The rows of the first table below a heading: of each cell the inline tokens."""
        tokens = iter(self._tokens)
        for token in tokens:
            if token.type == "heading_open" and next(tokens).content == heading:
                break
        else:
            raise LookupError(f"{self} has no heading {heading!r}")
        rows: list[list[list[Token]]] = []
        for token in tokens:
            if token.type == "tr_open":
                rows.append([])
            elif token.type == "inline" and rows:
                rows[-1].append(token.children or [])
            elif token.type == "table_close":
                return rows[1:]
        raise LookupError(f"{self} has no table below {heading!r}")


HANDBOOK = [Page(ROOT / "README.md"), *(Page(path) for path in sorted((ROOT / "docs").glob("*.md")))]
"""The README and the pages that it leads to."""

PAGES = [
    *HANDBOOK,
    *(Page(ROOT / name) for name in ("CONTRIBUTING.md", "CHANGELOG.md", "cluster/README.md")),
    Page(ROOT / "dreambooth/embedded/weights/README.md"),
]


def page(name: str) -> Page:
    """The page of this path."""
    [found] = [one for one in PAGES if str(one) == name]
    return found


def blocks(language: str) -> list[Block]:
    """The blocks of a language on all pages."""
    return [block for one in PAGES for block in one.blocks if block.language == language]
