"""What may be printed on a terminal, and with which characters."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

_CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def printable(text: str, encoding: str = "utf-8") -> str:
    """Text from elsewhere, without what a terminal would obey: control characters but newline and tab.

    What `encoding` has no character for becomes a question mark.
    """
    return text.translate(_CONTROLS).encode(encoding, "replace").decode(encoding)


def draws(console: Console, characters: str) -> bool:
    """Whether the console's encoding has these characters."""
    try:
        characters.encode(console.encoding)
    except UnicodeEncodeError:
        return False
    return True


def plain_text(text: str, console: Console, style: str = "") -> Text:
    """`printable` text as rich prints it: no markup is read in it, nothing is highlighted."""
    return Text(printable(text, console.encoding), style=style)
