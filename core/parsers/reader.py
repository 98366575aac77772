"""Parsers as coroutines: a parser is written as if all of its text were there, and waits wherever it is not."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable
from typing import TypeAlias, TypeVar

from core.parsers.events import Arguments, CallStart, Event, Reasoning, Text, merged
from core.parsers.json_scan import JsonScanner

T = TypeVar("T")
Steps: TypeAlias = Generator[None, None, T]
"""Waits for more text at each yield, and returns what it found."""

MAX_ATTEMPT = 64 * 1024
"""Characters that are kept back at most until it is certain whether they are a call."""
MAX_NAME = 64
_SPACE = " \t\n\r"


class Malformed(Exception):
    """What was expected is not there. Never leaves a parser."""


class StreamParser:
    """What all parsers share: text that has come and not been read, attempts that can be taken back, and events.

    A subclass writes `_run`. White space that stands alone around calls is markup; all other text is kept as it is.
    """

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._mark: int | None = None  # where an attempt began
        self._ended = False
        self._met_end = False  # the last attempt did, or what came after it
        self._events: list[Event] = []
        self._space = ""  # held back, since a call may follow
        self._has_text = False  # since the start or the last call
        self._has_calls = False
        self._steps = self._run()

    def _run(self) -> Steps[None]:
        raise NotImplementedError

    def feed(self, text: str) -> list[Event]:
        """What has become certain with this piece of text."""
        keep = self._at if self._mark is None else self._mark
        self._text = self._text[keep:] + text
        self._at -= keep
        if self._mark is not None:
            self._mark = 0
        next(self._steps, None)
        return self._drain()

    def finish(self) -> list[Event]:
        """The rest, once no more text comes."""
        self._ended = True
        next(self._steps, None)
        if self._space and not self._has_calls:
            self._events.append(Text(self._space))
        return self._drain()

    def _drain(self) -> list[Event]:
        events, self._events = self._events, []
        return merged(events)

    # -- events ------------------------------------------------------------------------------------------------------

    def _emit_text(self, text: str) -> None:
        if not self._has_text:
            text = self._space + text
            self._space = ""
            if not text.strip():
                self._space = text
                return
            self._has_text = True
        self._events.append(Text(text))

    def _emit_reasoning(self, text: str) -> None:
        self._events.append(Reasoning(text))

    def _emit_start(self, name: str) -> None:
        self._space = ""
        self._has_text = False
        self._has_calls = True
        self._events.append(CallStart(name))

    def _emit_arguments(self, text: str) -> None:
        self._events.append(Arguments(text))

    # -- reading -----------------------------------------------------------------------------------------------------

    def _peek(self) -> Steps[str]:
        """The next character, which stays; empty at the end."""
        if self._mark is not None and self._at - self._mark > MAX_ATTEMPT:
            raise Malformed
        while self._at == len(self._text):
            if self._ended:
                self._met_end = True
                return ""
            yield
        return self._text[self._at]

    def _next(self) -> Steps[str]:
        """The next character, which is read. There has to be one."""
        letter = yield from self._peek()
        if not letter:
            raise Malformed
        self._at += 1
        return letter

    def _literal(self, expected: str) -> Steps[None]:
        """This very text."""
        for letter in expected:
            if (yield from self._peek()) != letter:
                raise Malformed
            self._at += 1

    def _skip_space(self) -> Steps[str]:
        """White space, if there is any. Returns what comes behind it, as `_peek` does."""
        while (letter := (yield from self._peek())) and letter in _SPACE:
            self._at += 1
        return letter

    def _until(self, end: str, limit: int) -> Steps[str]:
        """Text up to `end`, which is consumed: at most `limit` characters."""
        found = ""
        while not found.endswith(end):
            if len(found) > limit + len(end):
                raise Malformed
            found += yield from self._next()
        return found[: len(found) - len(end)]

    def _word(self) -> Steps[str]:
        """The name of a tool."""
        word = ""
        while (letter := (yield from self._peek())) and (letter.isalnum() or letter in "_.-") and len(word) <= MAX_NAME:
            word += letter
            self._at += 1
        return word

    def _scan(self, scanner: JsonScanner) -> Steps[str]:
        """Let it read on. Returns the JSON that it has read, empty at the end of all text."""
        if not (yield from self._peek()):
            return ""
        end = len(self._text)
        if self._mark is not None:
            end = min(end, self._mark + MAX_ATTEMPT + 1)
        piece, self._at = scanner.feed(self._text, self._at, end)
        return piece

    def _attempt(self, steps: Steps[T]) -> Steps[T | None]:
        """What `steps` return; None if they are `Malformed`, and all that they read is unread. They emit nothing."""
        self._mark = self._at
        self._met_end = False
        try:
            return (yield from steps)
        except Malformed:
            assert self._mark is not None  # only this attempt ends it
            self._at = self._mark
            return None
        finally:
            self._mark = None

    def _place(self) -> int:
        """Where an attempt has come to, for `_return_to`."""
        assert self._mark is not None  # places are kept within attempts alone
        return self._at - self._mark

    def _return_to(self, place: int) -> None:
        assert self._mark is not None
        self._at = self._mark + place

    def _is_next(self, *expected: str) -> Steps[bool]:
        """Read these, each behind any white space, if all of them come next."""

        def steps() -> Steps[bool]:
            for text in expected:
                yield from self._skip_space()
                yield from self._literal(text)
            return True

        return bool((yield from self._attempt(steps())))

    def _pass_until(self, markers: Markers, emit: Callable[[str], None]) -> Steps[str]:
        """Give text to `emit` up to the first marker, which is consumed and returned; empty at the end of all text."""
        while True:
            found = markers.pattern.search(self._text, self._at)
            end = found.start() if found is not None else len(self._text)
            if found is None and not self._ended:
                end -= markers.begun(self._text, self._at)
            if end > self._at:
                emit(self._text[self._at : end])
                self._at = end
            if found is not None:
                self._at = found.end()
                return found[0]
            if self._ended:
                return ""
            yield


class Markers:
    """Texts that are looked for. None of them begins another one."""

    def __init__(self, words: Iterable[str]) -> None:
        self.words = tuple(dict.fromkeys(words))
        self.pattern = re.compile("|".join(map(re.escape, self.words)) or "(?!)")
        self._longest = max(map(len, self.words), default=0)

    def begun(self, text: str, start: int) -> int:
        """How many characters at the end of `text[start:]` may be the beginning of a marker."""
        for size in range(min(self._longest - 1, len(text) - start), 0, -1):
            tail = text[-size:]
            if any(word.startswith(tail) for word in self.words):
                return size
        return 0
