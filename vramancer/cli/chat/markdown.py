"""Markdown on a terminal while it is still being written.

Blocks that are complete are printed once and stay. Only the block that is being written is drawn again as it grows.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterable, Sequence
from typing import ClassVar

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich import markdown
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.syntax import Syntax
from rich.text import Text
from rich.theme import Theme

THEME = Theme(
    {
        "markdown.code": "cyan",
        "markdown.code_block": "none",
        "markdown.h1": "bold",
        "markdown.h2": "bold",
        "markdown.h3": "bold",
        "markdown.block_quote": "dim",
    }
)
"""Quiet, and without backgrounds, so that it reads on dark and on light terminals."""

_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
_LINE = re.compile(r"[^\n]*\n|[^\n]+")
"""Lines as the parser counts them; `str.splitlines` knows further ends."""
_REDRAW_S = 1 / 15
_SHARE_OF_TIME = 4
"""A redraw may take a quarter of the time; a block that takes long is drawn less often."""
_MARKERS = frozenset("-=*_#`~>+|.:0123456789 \t")
"""A line of these alone may still become anything."""


class _Heading(markdown.Heading):
    """At the left, whatever its level."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = self.text.copy()
        text.justify = "left"
        yield text


class _CodeBlock(markdown.CodeBlock):
    """Without a frame, so that it can be copied."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip()
        yield Syntax(code, self.lexer_name, theme="ansi_dark", word_wrap=True, background_color="default")


class _Markdown(markdown.Markdown):
    """As rich draws it, but that HTML is text, line breaks stay, and links show where they lead."""

    elements: ClassVar[dict[str, type[markdown.MarkdownElement]]] = {
        **markdown.Markdown.elements,
        "heading_open": _Heading,
        "fence": _CodeBlock,
        "code_block": _CodeBlock,
    }

    def __init__(self, text: str) -> None:
        super().__init__("", hyperlinks=False)
        self.parsed = _PARSER.parse(text)
        _keep_line_breaks(self.parsed)


def _keep_line_breaks(tokens: Iterable[Token]) -> None:
    for token in tokens:
        if token.type == "softbreak":
            token.type = "hardbreak"
        _keep_line_breaks(token.children or ())


class _Block:
    """One block, without empty lines around it and without the spaces at the ends of lines. With `gap` an empty line
    goes before it."""

    def __init__(self, text: str, *, gap: bool) -> None:
        self._content = _Markdown(text)
        self._gap = gap

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = [_stripped(line) for line in console.render_lines(self._content, options, pad=False)]
        while lines and not lines[0]:
            lines.pop(0)
        while lines and not lines[-1]:
            lines.pop()
        if self._gap:
            lines.insert(0, [])
        for line in lines:
            yield from line
            yield Segment.line()


def _stripped(line: list[Segment]) -> list[Segment]:
    line = list(line)
    while line and not line[-1].control and not line[-1].text.strip(" "):
        line.pop()
    if line and not line[-1].control:
        line[-1] = Segment(line[-1].text.rstrip(" "), line[-1].style)
    return line


class _Tail:
    """The last lines of something."""

    def __init__(self, content: RenderableType, most: int) -> None:
        self._content = content
        self._most = most

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in console.render_lines(self._content, options, pad=False)[-self._most :]:
            yield from line
            yield Segment.line()


class MarkdownWriter:
    """Writes Markdown as it comes; dots stand there until then. `finish` has to be called at the end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(
            Text("...", "dim"),
            console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False,
            vertical_overflow="visible",
        )  # fmt: skip
        self._rest = ""
        self._printed = False
        self._next_draw_s = 0.0
        console.push_theme(THEME)
        self._live.start(refresh=True)

    def write(self, text: str) -> None:
        """More of the text."""
        self._rest += text
        complete = stable_prefix(self._rest) if "\n" in text else 0
        if complete:
            blocks, self._rest = self._blocks(self._rest[:complete]), self._rest[complete:]
            self._printed = True
            self._live.update(self._drawn())
            self._console.print(blocks, end="")
        now_s = time.monotonic()
        if now_s >= self._next_draw_s:
            self._live.update(self._drawn(), refresh=True)
            taken_s = time.monotonic() - now_s
            self._next_draw_s = now_s + max(_REDRAW_S, _SHARE_OF_TIME * taken_s)

    def finish(self) -> None:
        """The last block is printed for good."""
        self._live.update("")
        if self._rest.strip():
            self._console.print(self._blocks(self._rest), end="")
        self._live.stop()
        self._console.pop_theme()

    def _drawn(self) -> RenderableType:
        """The block that is being written, as much of its end as there is room for."""
        return _Tail(self._blocks(_without_unsure_line(self._rest)), max(1, self._console.height - 1))

    def _blocks(self, text: str) -> RenderableType:
        blocks = enumerate(split_blocks(text))
        return Group(*(_Block(block, gap=self._printed or number > 0) for number, block in blocks))


def split_blocks(text: str) -> list[str]:
    """The blocks of a text, in order; together they are the text."""
    lines = _LINE.findall(text)
    starts = [token.map[0] for token in _top_level(text) if token.map][1:]
    bounds = [0, *starts, len(lines)]
    blocks = ["".join(lines[first:last]) for first, last in itertools.pairwise(bounds)]
    return [block for block in blocks if block.strip()]


def stable_prefix(text: str) -> int:
    """How many characters belong to blocks that no further text can change."""
    whole = text[: text.rfind("\n") + 1]
    lines = _LINE.findall(whole)
    tokens = _top_level(whole)
    if not tokens:
        return 0
    last = tokens[-1]
    assert last.map is not None
    return len("".join(lines if _is_closed(last, lines) else lines[: last.map[0]]))


def _top_level(text: str) -> list[Token]:
    """The first token of each block."""
    return [token for token in _PARSER.parse(text) if token.level == 0 and token.map and token.nesting >= 0]


def _is_closed(block: Token, lines: Sequence[str]) -> bool:
    """Whether the last block has ended. A list or a quote may go on after empty lines."""
    assert block.map is not None
    first, end = block.map
    if block.type in ("heading_open", "hr"):
        return True
    if block.type == "fence":
        mark = lines[end - 1].strip()
        return end - first > 1 and mark.startswith(block.markup) and not mark.strip(block.markup[0])
    return block.type in ("paragraph_open", "table_open") and end < len(lines)


def _without_unsure_line(text: str) -> str:
    """Without a last line that shows only marks yet: it might be a rule, a heading's underline, a fence, an item."""
    start = text.rfind("\n") + 1
    return text[:start] if _MARKERS.issuperset(text[start:]) else text
