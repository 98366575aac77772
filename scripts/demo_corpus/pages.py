"""Passages of this repository's English pages, from which the bundled embedding model learns the words of the field."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
_PAGES = ("README.md", "CHANGELOG.md", "core/README.md", "docs/*.md", "benchmarks/*.md")
_OTHER_LANGUAGES = ("INSTALL_ULTRA_DEBUTANT.md",)
_FENCE = re.compile(r"^```.*?^```[^\n]*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_SENTENCE = re.compile(r"(?<=[.:;?!])\s+")
_LEAST, _MOST = 6, 120
"""Words of a passage."""


class Passage(NamedTuple):
    """A paragraph, the heading above it, and its sentences."""

    heading: str
    text: str
    sentences: tuple[str, ...]


def passages() -> list[Passage]:
    """Of all pages, in the order of their names; none twice."""
    files = [file for pattern in _PAGES for file in sorted(ROOT.glob(pattern)) if file.name not in _OTHER_LANGUAGES]
    found = {passage.text: passage for file in files for passage in _of_page(file.read_text(encoding="utf-8"))}
    return list(found.values())


def _of_page(page: str) -> Iterator[Passage]:
    heading = ""
    for block in re.split(r"\n\s*\n|\n(?=[-*|] )", _FENCE.sub("\n\n", page)):
        text = " ".join(_LINK.sub(r"\1", block).translate(str.maketrans("", "", "*`|#")).split()).lstrip("- ")
        if block.lstrip().startswith("#"):
            heading = text
        elif _LEAST <= len(text.split()) <= _MOST:
            yield Passage(heading, text, tuple(_SENTENCE.split(text)))
