"""Which blocks a tier holds, as chains, and which of them goes first. No torch.

Blocks point to their parents. A block with no child *in the same tier* is a leaf; only leaves that nobody pins may go,
coldest first, so a chain loses its tail before its head and a parent never goes before its child. Blocks may arrive in
any order: the engine gives up tails first.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from core.tiers.hotness import HeatTable

_Entry = tuple[float, int, bytes]
"""Order of heat, running number (older first among equals), block."""

_MIN_COMPACTION = 64


class ChainIndex:
    """The blocks of one tier. Not thread-safe: its owner's lock guards it."""

    def __init__(self, heat: HeatTable) -> None:
        self._heat = heat
        self._parents: dict[bytes, bytes] = {}
        self._children: dict[bytes, set[bytes]] = {}
        self._pins: dict[bytes, int] = {}
        self._heap: list[_Entry] = []  # holds a current entry of every evictable block; others are stale
        self._numbers: dict[bytes, int] = {}
        self._next_number = 0

    def __len__(self) -> int:
        return len(self._parents)

    def __contains__(self, block: object) -> bool:
        return block in self._parents

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._parents)

    def parent(self, block: bytes) -> bytes:
        return self._parents[block]

    def is_pinned(self, block: bytes) -> bool:
        return block in self._pins

    def is_evictable(self, block: bytes) -> bool:
        return block in self._parents and block not in self._pins and not self._children.get(block)

    def add(self, block: bytes, parent: bytes) -> None:
        """Hold `block`, whose heat is known."""
        if block in self._parents:
            raise ValueError(f"block {block.hex()} is held already")
        self._heat.hold(block)
        self._parents[block] = parent
        self._children.setdefault(parent, set()).add(block)
        self._numbers[block] = self._next_number
        self._next_number += 1
        self.requeue(block)

    def remove(self, block: bytes) -> None:
        """Stop holding `block`, whether or not it may go: a block that was lost is gone in any case."""
        parent = self._parents.pop(block)
        del self._numbers[block]
        self._pins.pop(block, None)
        siblings = self._children[parent]
        siblings.discard(block)
        if not siblings:
            del self._children[parent]
            self.requeue(parent)
        self._heat.let_go(block)

    def pin(self, block: bytes) -> None:
        self._pins[block] = self._pins.get(block, 0) + 1

    def unpin(self, block: bytes) -> None:
        """Undo one `pin`; a block that has been lost meanwhile is ignored."""
        pins = self._pins.get(block, 0)
        if pins > 1:
            self._pins[block] = pins - 1
        elif pins == 1:
            del self._pins[block]
            self.requeue(block)

    def requeue(self, block: bytes) -> None:
        """The block's heat, or what keeps it from going, has changed: it is queued anew if it may go."""
        if not self.is_evictable(block):
            return
        if len(self._heap) > max(_MIN_COMPACTION, 4 * len(self._parents)):
            self._heap = [self._entry(known) for known in self._parents if self.is_evictable(known)]
            heapq.heapify(self._heap)
            return
        heapq.heappush(self._heap, self._entry(block))

    def coldest(self) -> bytes | None:
        """The block that goes next, or None if none may go."""
        return next(iter(self.coldest_leaves(1)), None)

    def coldest_leaves(self, count: int) -> list[bytes]:
        """Up to `count` blocks that may go, coldest first."""
        found: dict[bytes, _Entry] = {}
        while self._heap and len(found) < count:
            entry = heapq.heappop(self._heap)
            if self._is_current(entry):
                found[entry[2]] = entry
        for entry in found.values():
            heapq.heappush(self._heap, entry)
        return list(found)

    def with_descendants(self, block: bytes) -> list[bytes]:
        """`block` and everything in this tier that continues it, every child before its parent."""
        ordered = [block]
        for known in ordered:
            ordered.extend(self._children.get(known, ()))
        return ordered[::-1]

    def parents_first(self) -> list[bytes]:
        """All blocks, each after its parent."""
        ordered: dict[bytes, None] = {}
        for block in self._parents:
            chain = []
            while block in self._parents and block not in ordered:
                chain.append(block)
                block = self._parents[block]
            ordered.update(dict.fromkeys(reversed(chain)))
        return list(ordered)

    def _entry(self, block: bytes) -> _Entry:
        return self._heat.order(block), self._numbers[block], block

    def _is_current(self, entry: _Entry) -> bool:
        return self.is_evictable(entry[2]) and entry == self._entry(entry[2])

    def check_invariants(self) -> None:
        """Raise `AssertionError` unless chains, pins and the queue agree."""
        children: dict[bytes, set[bytes]] = {}
        for block, parent in self._parents.items():
            children.setdefault(parent, set()).add(block)
        if children != self._children:
            raise AssertionError("children and parents disagree")
        if set(self._pins) - set(self._parents) or any(pins < 1 for pins in self._pins.values()):
            raise AssertionError("pins of blocks that are not held")
        queued = {entry[2] for entry in self._heap if self._is_current(entry)}
        evictable = {block for block in self._parents if self.is_evictable(block)}
        if queued != evictable:
            raise AssertionError(f"{len(evictable - queued)} blocks that may go are not queued")
