"""Which inputs are computed together: next to each other by length, so that little of a batch is padding. No torch.

Every batch has the longest input of the request whose turn it is, and what is next to it by length, of whatever
request, as long as the padded batch stays within its tokens. Requests take turns, so a short one never waits behind all
of a long one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

MOST_PADDING = 0.0625
"""Largest share of a batch that is padding, unless the batch is small."""
SMALL_TOKENS = 256
"""Tokens of a batch that is not worth splitting for the padding in it."""


class Place(NamedTuple):
    """An input: how many tokens it has, its request's number and its own number in the request."""

    length: int
    request: int
    number: int


class WaitingInputs:
    """Inputs that wait, by length, and the turns of their requests. Not thread-safe."""

    def __init__(self) -> None:
        self._by_length: list[Place] = []
        self._of: OrderedDict[int, list[Place]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_length)

    def add(self, request: int, lengths: Iterable[int]) -> None:
        """A new request's inputs; its turn comes last."""
        places = sorted(Place(length, request, number) for number, length in enumerate(lengths))
        if len(places) > 16:
            self._by_length = sorted(self._by_length + places)
        else:
            for place in places:
                insort(self._by_length, place)
        self._of[request] = places

    def remove(self, request: int) -> int:
        """Give up what still waits of a request. Returns how many inputs that was."""
        places = self._of.pop(request, [])
        if places:
            self._by_length = [place for place in self._by_length if place.request != request]
        return len(places)

    def take(self, max_tokens: int) -> list[Place]:
        """The next batch, longest first; empty if nothing waits. One input is taken however long it is."""
        if not self._of:
            return []
        request = next(iter(self._of))
        self._of.move_to_end(request)
        anchor = bisect_left(self._by_length, self._of[request][-1])
        end = self._end(anchor, max_tokens)
        first = end - count_that_fits([place.length for place in reversed(self._by_length[:end])], max_tokens)
        batch = self._by_length[first:end]
        del self._by_length[first:end]
        self._forget(batch)
        return batch[::-1]

    def _end(self, anchor: int, max_tokens: int) -> int:
        """Behind the longest input that may come along with this one."""
        real = 0
        for end in range(anchor, len(self._by_length)):
            length = self._by_length[end].length
            real += length
            if end > anchor and not fits(length * (end + 1 - anchor), real, max_tokens):
                return end
        return len(self._by_length)

    def _forget(self, batch: list[Place]) -> None:
        taken = set(batch)
        for request in {place.request for place in batch}:
            left = [place for place in self._of[request] if place not in taken]
            if left:
                self._of[request] = left
            else:
                del self._of[request]

    def check_invariants(self) -> None:
        """Raise `AssertionError` unless both orders hold the same inputs."""
        of = sorted(place for places in self._of.values() for place in places)
        if of != self._by_length:
            raise AssertionError("inputs by length and by request differ")


def count_that_fits(lengths: list[int], max_tokens: int) -> int:
    """How many of `lengths`, which fall, make a batch: padded to the first within `max_tokens`, and little padding."""
    longest, real = lengths[0], 0
    for count, length in enumerate(lengths):
        real += length
        if count and not fits(longest * (count + 1), real, max_tokens):
            return count
    return len(lengths)


def fits(padded: int, real: int, max_tokens: int) -> bool:
    """Whether so many tokens, of which `real` are no padding, make a batch."""
    return padded <= max_tokens and (padded <= SMALL_TOKENS or padded - real <= MOST_PADDING * padded)
