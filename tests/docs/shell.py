"""Shell blocks as commands, each a list of words."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace

from tests.docs.pages import Block, blocks


@dataclass(frozen=True)
class Command:
    """A command of a page: its words, without variables set before it, and the file that its output goes to."""

    block: Block
    words: tuple[str, ...]
    output: str | None = None

    def __str__(self) -> str:
        """Where it is and how it begins, for the name of a test."""
        return f"{self.block} {' '.join(self.words[:3])}"


def commands_of(block: Block) -> list[Command]:
    """The commands of a block, line by line; a backslash joins lines."""
    found = []
    for line in re.sub(r"\\\n\s*", " ", block.text).splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if words:
            output = words[words.index(">") + 1] if ">" in words else None
            found.append(Command(block, tuple(words[: words.index(">")] if output else words), output))
    return found


def inner(command: Command) -> Command:
    """What `ray job submit` runs."""
    return replace(command, words=command.words[command.words.index("--") + 1 :])


COMMANDS = [command for block in blocks("sh") for command in commands_of(block)]
