"""Stop strings in streamed text. No torch here."""

from __future__ import annotations

from collections.abc import Collection


class StopChecker:
    """Finds the stop string that is complete first, however the text is cut into pieces.

    If two are complete with the same character, the longer one is taken. Text that may yet turn out to be the beginning
    of a stop string is held back, and nothing else is: at most one character less than the longest stop string.
    Work is proportional to the text and the number of stop strings, not to their lengths (Knuth, Morris and Pratt).
    """

    def __init__(self, stops: tuple[str, ...], include_stop: bool, specials: Collection[str] = ()) -> None:
        """`specials`: texts that may come hidden. A stop string that holds one of them is looked for in the whole text,
        all others in what is shown."""
        self._matchers = tuple(
            _Matcher(stop, any(special in stop for special in specials)) for stop in dict.fromkeys(stops) if stop
        )
        self._include_stop = include_stop
        self._held: list[tuple[str, bool]] = []
        self._matched: str | None = None

    def push(self, text: str, *, hidden: bool = False) -> tuple[str, str | None]:
        """Add `text`. Returns what is certain to be part of the answer, and the stop string if one is now complete.

        Hidden text (a special token's that the answer leaves out) may be part of a stop string, but is no part of the
        answer, unless it is part of a stop string that is. After a match all further text is dropped, and the match is
        returned again.
        """
        if self._matched is not None:
            return "", self._matched
        if not self._matchers:
            return "" if hidden else text, None
        end, first = len(text), None
        for matcher in self._matchers:
            found = matcher.feed(text, end) if matcher.sees_hidden or not hidden else None
            if found is not None and (first is None or found < end or matcher.length > first.length):
                end, first = found, matcher
        self._held.append((text[:end], hidden))
        if first is not None:
            self._matched = first.stop
            certain = self._release(self._reach(first, first.length))
            self._held.clear()
            return certain + first.stop if self._include_stop else certain, first.stop
        return self._release(max(self._reach(matcher, matcher.state) for matcher in self._matchers)), None

    def flush(self) -> str:
        """The text held back, when generation has ended without a stop string."""
        return self._release(0)

    def _reach(self, matcher: _Matcher, size: int) -> int:
        """How many characters at the end of what is held are the last `size` that a matcher has seen, with those that
        it has not seen between them."""
        if matcher.sees_hidden:
            return size
        reach = 0
        for text, hidden in reversed(self._held):
            if size == 0:
                break
            seen = 0 if hidden else min(size, len(text))
            reach += len(text) if hidden else seen
            size -= seen
        return reach

    def _release(self, keep: int) -> str:
        """What is shown of all that is held, but for the last `keep` characters, which stay."""
        held, self._held = self._held, []
        certain = sum(len(text) for text, _ in held) - keep
        shown = ""
        for text, hidden in held:
            size = max(0, min(certain, len(text)))
            certain -= size
            shown += "" if hidden else text[:size]
            if size < len(text):
                self._held.append((text[size:], hidden))
        return shown


class _Matcher:
    """Looks for one string. `state` characters at the end of the text so far are its beginning, and no more."""

    __slots__ = ("_borders", "length", "sees_hidden", "state", "stop")

    def __init__(self, stop: str, sees_hidden: bool) -> None:
        self.stop = stop
        self.sees_hidden = sees_hidden
        self.length = len(stop)
        self.state = 0
        self._borders = [0, 0]  # longest proper border of stop[:k], computed as far as it is needed

    def feed(self, text: str, end: int) -> int | None:
        """Read `text[:end]` up to the first match; returns where it ends."""
        stop, state, position = self.stop, self.state, 0
        while position < end:
            if state == 0:
                position = text.find(stop[0], position, end)
                if position < 0:
                    break
            character = text[position]
            while state and stop[state] != character:
                state = self._border(state)
            if stop[state] == character:
                state += 1
            position += 1
            if state == self.length:
                return position
        self.state = state
        return None

    def _border(self, length: int) -> int:
        borders, stop = self._borders, self.stop
        while len(borders) <= length:
            last = len(borders) - 1
            border = borders[last]
            while border and stop[last] != stop[border]:
                border = borders[border]
            borders.append(border + 1 if stop[last] == stop[border] else 0)
        return borders[length]
