"""Which replica has computed which prefixes: what a router believes of their caches.

A prefix is known by the chained hashes of its blocks (`core.kv_cache.block_table`): equal hashes mean equal prefixes,
so that the router needs no tokens, and can be told by replicas what they keep. It learns from what it routes itself.
Like a replica's own pool it forgets what was least recently used, and of a chain the tail before the head.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence


class PrefixIndex:
    """Hashes of blocks by replica, at most as many for each as it was said to hold. No locks: one thread uses it."""

    def __init__(self) -> None:
        self._blocks: dict[str, OrderedDict[Hashable, None]] = {}
        self._capacity: dict[str, int] = {}
        self._holders: dict[Hashable, set[str]] = {}

    def set_capacity(self, replica: str, blocks: int) -> None:
        """From now on so many blocks are kept for it; what is beyond is forgotten. Adds a replica that is new."""
        self._capacity[replica] = max(0, blocks)
        self._blocks.setdefault(replica, OrderedDict())
        self._shrink(replica)

    def forget(self, replica: str) -> None:
        """It is gone, or has lost its cache."""
        for digest in self._blocks.pop(replica, ()):
            self._drop(replica, digest)
        self._capacity.pop(replica, None)

    def record(self, replica: str, hashes: Sequence[Hashable]) -> None:
        """A replica that is known computes, or has just used, the blocks of this chain."""
        blocks = self._blocks[replica]
        for digest in reversed(hashes):  # so that the tail is older than the head
            if digest in blocks:
                blocks.move_to_end(digest)
            else:
                blocks[digest] = None
                self._holders.setdefault(digest, set()).add(replica)
        self._shrink(replica)

    def matches(self, hashes: Sequence[Hashable]) -> dict[str, int]:
        """By replica: how many leading blocks of the chain it holds; replicas with none are left out.

        Who holds a block holds those before it. So the holders become fewer along the chain, and only places where
        their number changes have to be looked for.
        """
        found: dict[str, int] = {}

        def look(low: int, high: int) -> None:
            """Settle who holds `low` blocks but fewer than `high`."""
            if high == low + 1:
                upper = self._holding(hashes, high)
                found.update((replica, low) for replica in self._holding(hashes, low) if replica not in upper)
                return
            middle = (low + high) // 2
            for first, last in ((low, middle), (middle, high)):
                if len(self._holding(hashes, first)) != len(self._holding(hashes, last)):
                    look(first, last)

        number = len(hashes)
        if number and len(self._holding(hashes, 1)) != len(self._holding(hashes, number)):
            look(1, number)
        found.update((replica, number) for replica in self._holding(hashes, number) if number)
        return found

    def size(self, replica: str) -> int:
        """Blocks that are known of it."""
        return len(self._blocks.get(replica, ()))

    def check_invariants(self) -> None:
        """Raise `AssertionError` unless both directions agree and no replica has more than its capacity."""
        for replica, blocks in self._blocks.items():
            if len(blocks) > self._capacity[replica]:
                raise AssertionError(f"{replica} has {len(blocks)} blocks of at most {self._capacity[replica]}")
        forward = {(replica, digest) for replica, blocks in self._blocks.items() for digest in blocks}
        backward = {(replica, digest) for digest, holders in self._holders.items() for replica in holders}
        if forward != backward or not all(self._holders.values()):
            raise AssertionError("blocks by replica and replicas by block do not agree")

    def _holding(self, hashes: Sequence[Hashable], count: int) -> set[str]:
        return self._holders.get(hashes[count - 1], set()) if count else set()

    def _shrink(self, replica: str) -> None:
        blocks = self._blocks[replica]
        while len(blocks) > self._capacity[replica]:
            digest, _ = blocks.popitem(last=False)
            self._drop(replica, digest)

    def _drop(self, replica: str, digest: Hashable) -> None:
        holders = self._holders[digest]
        holders.discard(replica)
        if not holders:
            del self._holders[digest]
