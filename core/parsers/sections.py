"""Calls between control words, several of them in one section: what Kimi's and DeepSeek's forms have in common."""

from __future__ import annotations

from typing import ClassVar

from core.parsers.calls import CallParser
from core.parsers.reader import MAX_NAME, Markers, Steps


class SectionParser(CallParser):
    """`first`, then calls of `opening`, a name, `separator`, arguments and `closing`, then `last`."""

    first: ClassVar[str]
    last: ClassVar[str]
    opening: ClassVar[str]
    separator: ClassVar[str]
    closing: ClassVar[str]
    _ends: ClassVar[Markers]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.openings = (cls.first, cls.opening)
        cls.markup = (cls.first, cls.last, cls.opening, cls.separator, cls.closing)
        cls._ends = Markers((cls.closing, cls.last))

    def _calls(self, marker: str) -> Steps[bool]:
        name = yield from self._attempt(self._head(is_open=marker == self.opening))
        if name is None:
            return False
        while name is not None:
            self._emit_start(name)
            yield from self._json_arguments(self._ends)
            yield from self._after_arguments()
            yield from self._is_next(self.closing)
            name = yield from self._attempt(self._head(is_open=False))
        yield from self._is_next(self.last)
        return True

    def _head(self, *, is_open: bool) -> Steps[str]:
        """A call up to its arguments."""
        yield from self._skip_space()
        if not is_open:
            yield from self._literal(self.opening)
        name = yield from self._named((yield from self._until(self.separator, MAX_NAME)).strip())
        if (yield from self._skip_space()) != "{":
            yield from self._literal("{")
        return self._known(name)

    def _named(self, head: str) -> Steps[str]:
        """The function's name, from what stands before the separator."""
        raise NotImplementedError

    def _after_arguments(self) -> Steps[None]:
        """What may stand before the closing word."""
        yield from ()
