"""Markdown on a terminal while it is still being written.

Blocks that are complete are printed once and stay. Only the block that is being written is drawn again as it grows.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import ClassVar

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich import markdown
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.syntax import Syntax
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


class _Lines:
    """The lines of something, without empty ones around it and without the spaces at their ends; of many no more than
    the last `most`. With `gap` an empty line goes before them."""

    def __init__(self, content: RenderableType, *, gap: bool, most: int | None = None) -> None:
        self._content = content
        self._gap = gap
        self._most = most

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = [_stripped(line) for line in console.render_lines(self._content, options, pad=False)]
        while lines and not lines[0]:
            lines.pop(0)
        while lines and not lines[-1]:
            lines.pop()
        if self._gap:
            lines.insert(0, [])
        for line in lines if self._most is None else lines[-self._most :]:
            yield from line
            yield Segment.line()


def _stripped(line: list[Segment]) -> list[Segment]:
    line = list(line)
    while line and not line[-1].control and not line[-1].text.strip(" "):
        line.pop()
    if line and not line[-1].control:
        line[-1] = Segment(line[-1].text.rstrip(" "), line[-1].style)
    return line


class MarkdownWriter:
    """Writes Markdown as it comes. `finish` has to be called at the end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(
            console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False,
            vertical_overflow="visible",
        )  # fmt: skip
        self._rest = ""
        self._printed = False
        self._next_draw_s = 0.0
        console.push_theme(THEME)
        self._live.start()

    def write(self, text: str) -> None:
        """More of the text."""
        self._rest += text
        if "\n" in text:
            complete = stable_prefix(self._rest)
            if complete:
                block, self._rest = self._rest[:complete], self._rest[complete:]
                self._live.update(self._drawn(printed=True))
                self._print(block)
        now_s = time.monotonic()
        if now_s >= self._next_draw_s:
            self._live.update(self._drawn(printed=self._printed), refresh=True)
            taken_s = time.monotonic() - now_s
            self._next_draw_s = now_s + max(_REDRAW_S, _SHARE_OF_TIME * taken_s)

    def finish(self) -> None:
        """The last block is printed for good."""
        self._live.update("")
        if self._rest.strip():
            self._print(self._rest)
        self._live.stop()
        self._console.pop_theme()

    def _print(self, block: str) -> None:
        self._console.print(_Lines(_Markdown(block), gap=self._printed), end="")
        self._printed = True

    def _drawn(self, *, printed: bool) -> RenderableType:
        """The block that is being written, as much of its end as there is room for."""
        text = _without_unsure_line(self._rest)
        if not text.strip():
            return ""
        return _Lines(_Markdown(text), gap=printed, most=max(1, self._console.height - 1))


def stable_prefix(text: str) -> int:
    """How many characters belong to blocks that no further text can change: all before the last one begun."""
    whole = text[: text.rfind("\n") + 1]
    starts = [token.map[0] for token in _PARSER.parse(whole) if token.level == 0 and token.map and token.nesting >= 0]
    if len(starts) < 2:
        return 0
    return sum(len(line) for line in whole.splitlines(keepends=True)[: starts[-1]])


def _without_unsure_line(text: str) -> str:
    """Without a last line that shows only marks yet: it might be a rule, a heading's underline, a fence, an item."""
    start = text.rfind("\n") + 1
    return text[:start] if _MARKERS.issuperset(text[start:]) else text
