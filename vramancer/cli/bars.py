"""Bars of memory, in colours or in characters that tell the parts apart without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from vramancer.cli.terminal import draws

GIB = 1 << 30

_BLOCKS = {
    "weights": "█", "kv_used": "▓", "kv_cached": "▒", "kv_empty": "░", "workspace": "▄", "lent": "▞", "free": "·",
}  # fmt: skip
_ASCII = {
    "weights": "#", "kv_used": "=", "kv_cached": "-", "kv_empty": "_", "workspace": "w", "lent": "L", "free": ".",
}  # fmt: skip
_STYLES = {
    "weights": "blue", "kv_used": "green", "kv_cached": "cyan", "kv_empty": "dim green", "workspace": "yellow",
    "lent": "magenta", "free": "dim",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """A share of some memory, drawn as `kind` is."""

    name: str
    bytes: int
    kind: str


@dataclass(frozen=True, slots=True)
class Glyphs:
    """A character for each kind of part. `rich`: the console has characters beyond ASCII."""

    characters: Mapping[str, str]
    rich: bool


def glyphs_for(console: Console) -> Glyphs:
    """Those that the console's encoding has."""
    rich = draws(console, "".join(_BLOCKS.values()) + "…")
    return Glyphs(_BLOCKS if rich else _ASCII, rich)


def bar(parts: Sequence[Part], total_bytes: int, width: int, glyphs: Glyphs) -> Text:
    """`width` cells for `total_bytes`. Whatever is there has a cell at least, if there are enough."""
    text = Text(no_wrap=True)
    for part, cells in zip(parts, shares([part.bytes for part in parts], total_bytes, width), strict=True):
        text.append(glyphs.characters[part.kind] * cells, _STYLES[part.kind])
    return text


def shares(amounts: Sequence[int], total: int, cells: int) -> list[int]:
    """Whole cells in proportion to the amounts, `cells` together where the amounts come to the total."""
    if total <= 0:
        return [0] * len(amounts)
    exact = [cells * max(0, amount) / total for amount in amounts]
    given = [max(int(share), 1 if share > 0 else 0) for share in exact]
    wanted = min(cells, round(sum(exact)))
    while sum(given) < wanted:
        given[max(range(len(exact)), key=lambda index: exact[index] - given[index])] += 1
    while sum(given) > wanted:
        given[max(range(len(exact)), key=lambda index: (given[index] > 1, given[index] - exact[index]))] -= 1
    return given


def legend(parts: Sequence[Part], glyphs: Glyphs) -> list[Text]:
    """What the bar's parts are and how much, in GiB, without those that are nothing."""
    return [
        Text.assemble((glyphs.characters[part.kind], _STYLES[part.kind]), f" {part.name} {size(part.bytes)}")
        for part in parts
        if part.bytes > 0
    ]


def flow(items: Sequence[Text], width: int) -> Text:
    """The items side by side, as many as fit into each line; none is broken."""
    lines: list[Text] = []
    for item in items:
        if lines and lines[-1].cell_len + 2 + item.cell_len <= width:
            lines[-1] = Text.assemble(lines[-1], "  ", item)
        else:
            lines.append(item)
    return Text("\n").join(lines)


def size(amount_bytes: int) -> str:
    """In GiB, without the unit: "12.4", "0.003", "<0.001"."""
    gib = amount_bytes / GIB
    if gib >= 10:
        return f"{gib:.1f}"
    if gib >= 0.1 or amount_bytes == 0:
        return f"{gib:.2f}"
    return f"{gib:.3f}" if gib >= 0.0005 else "<0.001"
