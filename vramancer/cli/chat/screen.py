"""What `run` shows: answers on standard output, all else on standard error."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vramancer.cli.chat.answerer import Piece
from vramancer.cli.terminal import draws, plain_text, printable

_DRAWN = "─│█▌•"
"""What tables, quotes and lists are drawn with."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came. Seconds count from the question: to the first token (None: none came) and to the last. `tokens` is
    None where they were not counted."""

    text: str
    tokens: int | None
    first_s: float | None
    last_s: float
    stopped: bool = False
    finish_reason: str | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first, which waits for the prompt; None for fewer than two."""
        if self.tokens is None or self.tokens < 2 or self.first_s is None or self.last_s <= self.first_s:
            return None
        return (self.tokens - 1) / (self.last_s - self.first_s)

    def summary(self) -> str:
        """One line: tokens, rate, time to the first token, and whether there would have been more."""
        parts = [] if self.tokens is None else [f"{self.tokens} token{'' if self.tokens == 1 else 's'}"]
        if self.tokens_per_second is not None:
            parts.append(f"{self.tokens_per_second:.1f} tok/s")
        if self.first_s is not None:
            parts.append(f"first token after {self.first_s:.2f} s")
        if self.stopped:
            parts.append("stopped")
        elif self.finish_reason == "length":
            parts.append("cut off: max_tokens or the context's end")
        return ", ".join(parts)


class Writer(Protocol):
    """Shows an answer's text as it comes."""

    def write(self, text: str) -> None: ...

    def finish(self) -> None: ...


class PlainWriter:
    """The text as it is. On a terminal nothing that it would obey; elsewhere every character."""

    def __init__(self, console: Console) -> None:
        self._file = console.file
        self._encoding = console.encoding
        self._terminal = console.file.isatty()
        self._last = "\n"

    def write(self, text: str) -> None:
        encoded = printable if self._terminal else _encodable
        text = encoded(text, self._encoding)
        self._file.write(text)
        self._file.flush()
        self._last = text[-1:] or self._last

    def finish(self) -> None:
        """An answer ends with its line."""
        if self._last != "\n":
            self._file.write("\n")
            self._file.flush()


def _encodable(text: str, encoding: str) -> str:
    return text.encode(encoding, "replace").decode(encoding)


class Screen:
    """`answers` are written to one console, `notes` and errors to the other. `plain`: no Markdown is drawn. `clock`
    gives seconds."""

    def __init__(
        self,
        answers: Console,
        notes: Console,
        *,
        plain: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._answers = answers
        self._clock = clock
        self._notes = notes
        self._plain = plain or not _draws_markdown(answers)

    def note(self, text: str) -> None:
        """A dim line."""
        self._say(plain_text(text, self._notes, "dim"))

    def error(self, text: str) -> None:
        self._say(Text("error: ", "red") + plain_text(text, self._notes))

    def show(self, text: str) -> None:
        """What a command was asked for."""
        self._say(plain_text(text, self._notes))

    def show_table(self, rows: Iterable[Sequence[str]]) -> None:
        """The same in columns."""
        table = Table.grid(padding=(0, 2, 0, 0))
        for row in rows:
            table.add_row(*(plain_text(cell, self._notes) for cell in row))
        for column in table.columns[:-1]:
            column.no_wrap = True
        self._notes.print(table)

    def _say(self, text: Text) -> None:
        """Wrapped between words on a terminal; elsewhere a line stays one."""
        self._notes.print(text, soft_wrap=not self._notes.is_terminal)

    def ask_for(self, prompt: str) -> None:
        """What a line that is typed next is for."""
        self._notes.print(plain_text(prompt, self._notes), end="")

    def answer(self, pieces: Generator[Piece, None, None]) -> Answer:
        """Show an answer as it comes. Ctrl-C stops it and keeps what came. Raises what `pieces` raise."""
        started_s = self._clock()
        texts: list[str] = []
        tokens, reason, first_s, last_s, stopped = None, None, None, 0.0, False
        writer = self._writer()
        try:
            with closing(pieces):
                for piece in pieces:
                    reason = piece.finish_reason or reason
                    if piece.text or (piece.tokens or 0) > (tokens or 0):
                        last_s = self._clock() - started_s
                        first_s = last_s if first_s is None else first_s
                    tokens = piece.tokens if piece.tokens is not None else tokens
                    if piece.text:
                        texts.append(piece.text)
                        writer.write(piece.text)
        except KeyboardInterrupt:
            stopped = True
        finally:
            writer.finish()
        return Answer("".join(texts), tokens, first_s, last_s, stopped, reason)

    def _writer(self) -> Writer:
        if self._plain:
            return PlainWriter(self._answers)
        from vramancer.cli.chat.markdown import MarkdownWriter

        return _Printable(MarkdownWriter(self._answers), self._answers.encoding)


class _Printable:
    """Another writer, which gets only what may be printed."""

    def __init__(self, writer: Writer, encoding: str) -> None:
        self._writer = writer
        self._encoding = encoding

    def write(self, text: str) -> None:
        self._writer.write(printable(text, self._encoding))

    def finish(self) -> None:
        self._writer.finish()


def _draws_markdown(console: Console) -> bool:
    """A terminal that understands more than text, whose user wants that."""
    return (
        console.file.isatty()
        and console.is_terminal
        and not console.is_dumb_terminal
        and not console.no_color
        and draws(console, _DRAWN)
    )
