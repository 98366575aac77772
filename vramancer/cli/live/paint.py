"""Rich's text as prompt_toolkit draws it."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from prompt_toolkit.formatted_text import StyleAndTextTuples
from rich.console import Console
from rich.style import Style
from rich.text import Text

_COLORS = ("black", "red", "green", "yellow", "blue", "magenta", "cyan", "gray")
"""The first eight, by prompt_toolkit's names."""


def fragments(lines: Sequence[Text], console: Console) -> StyleAndTextTuples:
    """Of the lines of a screen."""
    found: StyleAndTextTuples = []
    for number, line in enumerate(lines):
        if number:
            found.append(("", "\n"))
        found += [(_style(part.style), part.text) for part in line.render(console) if part.text]
    return found


@functools.cache
def _style(style: Style | None) -> str:
    """Colours are the terminal's own eight, so that they fit its background."""
    if style is None:
        return ""
    words = [name for name in ("bold", "dim", "reverse", "underline") if getattr(style, name)]
    if style.color is not None and style.color.number is not None:
        words.append(f"fg:ansi{_COLORS[style.color.number % len(_COLORS)]}")
    return " ".join(words)
