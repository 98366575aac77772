"""Where questions are typed: with line editing and history on a terminal, line by line elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completer
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings

QUOTES = '"""'
"""Begins and ends a question of several lines."""
HISTORY_NAME = "chat-history"

_PROMPT = "> "
_CONTINUATION = "... "

Note = Callable[[str], None]


class Reader(Protocol):
    """Where lines are typed."""

    def read(self, prompt: str = _PROMPT) -> str:
        """One question, or a whole quoted text with its quotes. Raises `EOFError` and `KeyboardInterrupt`."""


def is_open(text: str) -> bool:
    """Whether a quoted text has begun and not ended."""
    text = text.strip()
    return text.startswith(QUOTES) and (len(text) < 2 * len(QUOTES) or not text.endswith(QUOTES))


def unquoted(text: str) -> str:
    """What was typed, without the quotes of several lines and the space around it."""
    text = text.strip()
    if text.startswith(QUOTES) and not is_open(text):
        return text[len(QUOTES) : -len(QUOTES)].strip("\n")
    return text


class LineReader:
    """Reads standard input; `show` shows what a line is for."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show

    def read(self, prompt: str = _PROMPT) -> str:
        text = self._line(prompt)
        while is_open(text):
            text += "\n" + self._line(_CONTINUATION)
        return text

    def _line(self, prompt: str) -> str:
        self._show(prompt)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")


class Editor:
    """A line editor with the history of earlier sessions. Alt-Enter begins a new line, as Enter does between quotes.

    `history` is the file that keeps it, `names` what Tab completes after `/`, and after `/set `. `note` is told why
    nothing is kept, if it is not.
    """

    def __init__(self, history: Path, names: dict[str, Iterable[str]], note: Note) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.application import get_app
        from prompt_toolkit.filters import Condition

        self._session: PromptSession[str] = PromptSession(
            history=open_history(history, note),
            completer=command_completer(names),
            complete_while_typing=False,
            multiline=Condition(lambda: is_open(get_app().current_buffer.text)),
            prompt_continuation=_CONTINUATION,
            key_bindings=_new_line_keys(),
        )

    def read(self, prompt: str = _PROMPT) -> str:
        if prompt == _PROMPT:
            return self._session.prompt(prompt)
        from prompt_toolkit import prompt as ask_once

        return ask_once(prompt)


def open_history(path: Path, note: Note) -> History:
    """The history in `path`, which its owner alone can read; in memory where there can be no such file."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class KeptHistory(FileHistory):
        """Goes on in memory when the file can no longer be written."""

        def store_string(self, string: str) -> None:
            try:
                super().store_string(string)
            except OSError as error:
                note(f"{path}: the question is not kept: {error.strerror}.")

    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        path.chmod(0o600)
    except OSError as error:
        note(f"{path}: questions are not kept: {error.strerror}.")
        return InMemoryHistory()
    return KeptHistory(path)


def _new_line_keys() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def command_completer(names: dict[str, Iterable[str]]) -> Completer:
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document

    class CommandCompleter(Completer):
        """Commands, and after some of them what they take."""

        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
            first, space, rest = document.text_before_cursor.partition(" ")
            if not first.startswith("/") or " " in rest:
                return
            typed, known = (rest, names.get(first, ())) if space else (first, names)
            for name in known:
                if name.startswith(typed):
                    yield Completion(name, start_position=-len(typed))

    return CommandCompleter()
