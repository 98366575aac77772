"""Lines of text for a given width: columns of which some may be left out, blocks of which some may be cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.text import Text

from vramancer.cli.bars import Glyphs, glyphs_for
from vramancer.cli.terminal import draws, plain_text

GAP = 2
TITLE = "bold"


@dataclass(frozen=True, slots=True)
class Column:
    """A column below its title. Where there is no room, those that `yields` most are left out first; 0 stays."""

    title: str
    cells: Sequence[Text]
    right: bool = False
    yields: int = 0


@dataclass(frozen=True, slots=True)
class Flexible:
    """A column as wide as there is room, from `least` to `most`; `draw` makes its cells."""

    title: str
    draw: Callable[[int], Sequence[Text]]
    least: int
    most: int


@dataclass(frozen=True, slots=True)
class Block:
    """Lines that belong together. Of a block that `yields`, lines are cut from the end where there is no room, those of
    the block that yields most first; `least` stay, the last of which tells, by `more`, how many are missing."""

    lines: Sequence[Text]
    yields: int = 0
    least: int = 0
    more: Callable[[int], Text] | None = None
    close: bool = field(default=False)
    """Whether it follows the block before without an empty line."""


class Canvas:
    """What can be drawn in `width` columns of a console."""

    def __init__(self, console: Console, width: int) -> None:
        self.console = console
        self.width = width
        self.glyphs: Glyphs = glyphs_for(console)
        self.degree = "°C" if draws(console, "°") else " C"

    def text(self, text: object, style: str = "") -> Text:
        """Of anything that a server says: on one line, with nothing that a terminal would obey."""
        line = " ".join(str(text).split())
        return plain_text(line, self.console, style)

    def cut(self, text: Text, width: int) -> Text:
        """No wider than that."""
        if text.cell_len > width:
            text = text.copy()
            text.truncate(width, overflow="ellipsis" if self.glyphs.rich else "crop")
        return text

    def beside(self, items: Iterable[Text], width: int | None = None) -> Text:
        """The first items, as many as fit into a line; the very first is cut."""
        width = self.width if width is None else width
        line = Text()
        for item in items:
            if not line:
                line = self.cut(item, width)
            elif line.cell_len + GAP + item.cell_len <= width:
                line = Text.assemble(line, " " * GAP, item)
            else:
                break
        return line

    def columns(self, columns: Sequence[Column | Flexible]) -> list[Text]:
        """The titles' line, and one for each row."""
        shown = list(columns)
        while (room := self._room(shown)) < 0:
            most = max((column.yields for column in shown if isinstance(column, Column)), default=0)
            if not most:
                break
            shown = [column for column in shown if not (isinstance(column, Column) and column.yields == most)]
        drawn: list[Sequence[Text]] = []
        for column in shown:
            if isinstance(column, Column):
                width = _width(column)
                drawn.append([_aligned(cell, width, right=column.right) for cell in (_title(column), *column.cells)])
            else:
                width = max(column.least, min(column.most, column.least + room))
                drawn.append([_aligned(cell, width) for cell in (_title(column), *column.draw(width))])
        return [self.cut(Text(" " * GAP).join(row), self.width) for row in zip(*drawn, strict=True)]

    def _room(self, columns: Sequence[Column | Flexible]) -> int:
        """Left beside what all columns need at least."""
        needed = sum(_width(column) if isinstance(column, Column) else column.least for column in columns)
        return self.width - needed - GAP * (len(columns) - 1)


def _title(column: Column | Flexible) -> Text:
    return Text(column.title, TITLE)


def _width(column: Column) -> int:
    return max(cell.cell_len for cell in (_title(column), *column.cells))


def _aligned(text: Text, width: int, *, right: bool = False) -> Text:
    spaces = " " * max(0, width - text.cell_len)
    return Text.assemble(spaces, text) if right else Text.assemble(text, spaces)


def stacked(blocks: Sequence[Block], rows: int) -> list[Text]:
    """The blocks below each other, with empty lines between them as far as there is room, in no more than `rows`."""
    blocks = [block for block in blocks if block.lines]
    excess = sum(len(block.lines) for block in blocks) - rows
    sizes = [len(block.lines) for block in blocks]
    for index in sorted(range(len(blocks)), key=lambda index: -blocks[index].yields):
        if blocks[index].yields and excess > 0:
            given = min(excess, max(0, sizes[index] - blocks[index].least))
            sizes[index] -= given
            excess -= given
    spaces, lines = max(0, -excess), list[Text]()
    for index, (block, size) in enumerate(zip(blocks, sizes, strict=True)):
        if index and size and spaces and not block.close:
            lines.append(Text())
            spaces -= 1
        lines += _cut(block, size)
    return lines[:rows]


def _cut(block: Block, size: int) -> list[Text]:
    missing = len(block.lines) - size
    if not missing or block.more is None or size < 2:
        return list(block.lines[:size])
    return [*block.lines[: size - 1], block.more(missing + 1)]
