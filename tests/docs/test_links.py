"""Every link of the pages that leads into the repository leads to a file, and to a heading that is there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from doc_pages import REPOSITORY, pages
from markdown_it import MarkdownIt
from markdown_it.token import Token

PAGES = {str(page.relative_to(REPOSITORY)): page for page in pages()}


def inline(text: str) -> Iterator[Token]:
    for token in MarkdownIt().parse(text):
        yield from token.children or ()


def targets(text: str) -> list[str]:
    """Of links and images."""
    found = [token.attrs.get("href", token.attrs.get("src")) for token in inline(text)]
    return [str(target) for target in found if target is not None]


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them: lower case, without punctuation, a hyphen for each space; the second of
    the same name has "-1" behind it."""
    tokens = MarkdownIt().parse(text)
    names: set[str] = set()
    seen: Counter[str] = Counter()
    for token, content in pairwise(tokens):
        if token.type != "heading_open":
            continue
        shown = "".join(child.content for child in content.children or ())
        name = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        names.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return names


def broken(page: Path) -> list[str]:
    wrong = []
    for target in targets(page.read_text(encoding="utf-8")):
        parts = urlsplit(target)
        if parts.scheme:
            continue
        file = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        if not file.is_relative_to(REPOSITORY) or not file.exists():
            wrong.append(f"{target}: no such file")
        elif parts.fragment and unquote(parts.fragment) not in anchors(file.read_text(encoding="utf-8")):
            wrong.append(f"{target}: no such heading")
    return wrong


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    assert not broken(PAGES[name])


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = REPOSITORY / "docs" / "start.md"
    assert "1-install" in anchors(page.read_text(encoding="utf-8"))
    assert anchors("# `a b`: c, d!\n# A B: C D\n") == {"a-b-c-d", "a-b-c-d-1"}
    assert targets("[a](b.md#c) ![d](e.svg)\n\n```\n[f](g)\n```\n") == ["b.md#c", "e.svg"]


def test_every_page_of_docs_can_be_reached_from_the_readme() -> None:
    """By links from page to page."""
    reached, ahead = set(), [REPOSITORY / "README.md"]
    while ahead:
        page = ahead.pop()
        reached.add(page)
        paths = [urlsplit(target) for target in targets(page.read_text(encoding="utf-8"))]
        linked = {(page.parent / unquote(parts.path)).resolve() for parts in paths if parts.path and not parts.scheme}
        ahead += [file for file in linked - reached if file.suffix == ".md" and file.exists()]
    assert {page for page in PAGES.values() if page.parent.name == "docs"} <= reached
