"""The repository's Markdown pages, as the tests of the documents read them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block; `language` and `marks` are the words behind its fence."""

    language: str
    marks: frozenset[str]
    text: str


def pages() -> list[Path]:
    """Every page that people read."""
    folders = [REPOSITORY, *(REPOSITORY / name for name in ("docs", "core", "benchmarks"))]
    return sorted(page for folder in folders for page in folder.glob("**/*.md" if folder != REPOSITORY else "*.md"))


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "fence":
            language, *marks = token.info.split() or [""]
            yield Block(language, frozenset(marks), token.content)


def inline_code(text: str) -> Iterator[str]:
    """Pieces of code in running text, headings and tables."""
    for token in MarkdownIt().enable("table").parse(text):
        yield from (child.content for child in token.children or () if child.type == "code_inline")


def shell_lines(text: str) -> Iterator[str]:
    """The command lines of a block for a shell: those that go on behind a backslash in one, without empty ones."""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if line.strip():
            yield line.strip()
