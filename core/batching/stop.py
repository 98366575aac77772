"""Stop strings in streamed text. No torch here."""

from __future__ import annotations


class StopChecker:
    """Finds the stop string that is complete first, however the text is cut into pieces.

    If two are complete with the same character, the longer one is taken. Text that may yet turn out to be the beginning
    of a stop string is held back, and nothing else is: at most one character less than the longest stop string.
    Work is proportional to the text and the number of stop strings, not to their lengths (Knuth, Morris and Pratt).
    """

    def __init__(self, stops: tuple[str, ...], include_stop: bool) -> None:
        self._matchers = tuple(_Matcher(stop) for stop in dict.fromkeys(stops) if stop)
        self._include_stop = include_stop
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Add `text`. Returns what is certain to be part of the answer, and the stop string if one is now complete.

        After a match all further text is dropped, and the match is returned again.
        """
        if self._matched is not None:
            return "", self._matched
        if not self._matchers:
            return text, None
        end, length = len(text), 0
        for matcher in self._matchers:
            found = matcher.feed(text, end)
            if found is not None and (found < end or matcher.length > length):
                end, length, self._matched = found, matcher.length, matcher.stop
        known = self._held + text[:end]
        if self._matched is not None:
            self._held = ""
            return known if self._include_stop else known[: len(known) - length], self._matched
        certain = len(known) - max(matcher.state for matcher in self._matchers)
        self._held = known[certain:]
        return known[:certain], None

    def flush(self) -> str:
        """The text held back, when generation has ended without a stop string."""
        held, self._held = self._held, ""
        return held


class _Matcher:
    """Looks for one string. `state` characters at the end of the text so far are its beginning, and no more."""

    __slots__ = ("_borders", "length", "state", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
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
