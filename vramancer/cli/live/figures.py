"""Figures as people read them, and small drawings of them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from vramancer.cli.bars import Glyphs, Part, bar
from vramancer.cli.live.answers import Quantiles

UNKNOWN = "-"
_HEIGHTS = "▁▂▃▄▅▆▇█"
_ASCII_HEIGHTS = "_.,-~=*#"


def percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{share:.0%}"


def rate(tokens_per_second: float) -> str:
    return f"{tokens_per_second:.1f}" if tokens_per_second < 1000 else f"{tokens_per_second:.0f}"


def quantiles(found: Quantiles | None) -> str:
    """Half, 95 and 99 of a hundred, in one unit: "14 18 25 ms"."""
    values = (found.p50, found.p95, found.p99) if found else ()
    known = [value for value in values if value is not None]
    if not known:
        return UNKNOWN
    small = max(known) < 1
    shown = [UNKNOWN if value is None else _digits(1000 * value if small else value) for value in values]
    return f"{' '.join(shown)} {'ms' if small else 's'}"


def _digits(value: float) -> str:
    """Two digits, or all before the point."""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def share_bar(share: float, width: int, glyphs: Glyphs, kind: str = "kv_used") -> Text:
    """How much of the whole."""
    full = max(0, min(1000, round(1000 * share)))
    return bar([Part("", full, kind), Part("", 1000 - full, "free")], 1000, width, glyphs)


def sparkline(values: Sequence[float | None], glyphs: Glyphs) -> Text:
    """A column for each value, as high as it is beside the highest; a space where it is not known."""
    heights = _HEIGHTS if glyphs.rich else _ASCII_HEIGHTS
    top = max((value for value in values if value), default=0.0)

    def height(value: float | None) -> str:
        if value is None:
            return " "
        return heights[min(len(heights) - 1, int(value / top * len(heights)))] if top > 0 else heights[0]

    return Text("".join(map(height, values)), "green", no_wrap=True)
