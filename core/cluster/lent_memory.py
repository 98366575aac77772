"""L4: the main memory that workers offer, as one place for blocks of a model. Workers come and go; a block is with one
of them, and goes with it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass

from core.cluster.block_wire import HEAD_BYTES, BlockRef
from core.cluster.master import Change, Master
from core.cluster.messages import Lend, Release
from core.cluster.node import Node
from core.errors import NetworkError, VRAMancerError
from core.logs import get_logger
from core.tiers.measure import measure_peer
from core.tiers.records import TierSpeed

logger = get_logger(__name__)

_TIMES = 3
"""That a machine's memory is measured; what is fastest counts."""


class _Lender:
    """What one worker keeps. A `Peer`, but for what it raises."""

    def __init__(self, node: Node, memory: int, block_nbytes: int) -> None:
        self.node, self.name = node, node.name
        self.memory = memory
        self._block_nbytes = block_nbytes
        self.capacity_bytes = node.info.lends_bytes
        self.blocks: dict[bytes, int] = {}
        self.used_bytes = 0
        self.speed = TierSpeed(1.0, 1.0)
        self.leaves = False

    def has_room(self, nbytes: int) -> bool:
        return not self.leaves and self.used_bytes + nbytes <= self.capacity_bytes

    def put(self, block: bytes, data: memoryview) -> bool:
        return self.node.block_calls.put(self.memory, BlockRef(block), data)

    def get(self, block: bytes) -> memoryview | None:
        return self.node.block_calls.get(self.memory, BlockRef(block), self.blocks.get(block, self._block_nbytes))

    def drop(self, block: bytes) -> None:
        self.node.block_calls.drop(self.memory, BlockRef(block))

    def close(self) -> None:
        if self.node.lost is None:
            try:
                self.node.call(Release((self.memory,)))
            except VRAMancerError as error:
                logger.warning("lent memory could not be freed", node=self.name, reason=error.message)


@dataclass(frozen=True, slots=True)
class LentMemoryEvents:
    """What becomes of it: `found` hears how fast the first worker is, before anything is put there; `gone` of blocks
    that went with a worker. `worth` says of a worker's speed whether reading a block back would beat computing it."""

    found: Callable[[TierSpeed], None]
    gone: Callable[[Collection[bytes]], None]
    worth: Callable[[TierSpeed], bool]


class LentMemory:
    """A `Peer`. Workers that offer memory are used from `open` on, and when they join, until `close`. Thread-safe."""

    name = "other machines' memory"

    def __init__(self, master: Master, block_nbytes: int) -> None:
        self._master = master
        self._block_nbytes = block_nbytes
        self._events: LentMemoryEvents | None = None
        self._lock = threading.Lock()
        self._joining = threading.Lock()
        self._lenders: dict[str, _Lender] = {}
        self._closed = False
        self._announced = False

    def open(self, events: LentMemoryEvents) -> None:
        """Waits for what is measured. Not under anybody's lock: `events` are heard."""
        self._events = events
        self._master.on_change.append(self._changed)
        for node in self._master.nodes:
            self._join(node)

    # -- machines ---------------------------------------------------------------------------------------------------

    def _changed(self, change: Change, node: Node) -> None:
        if change == "joined":
            self._join(node)
            return
        with self._lock:
            lender = self._lenders.get(node.id)
        if lender is None or lender.node is not node:
            return
        lender.leaves = True
        if change == "lost":
            self._lose(lender)

    def _lose(self, lender: _Lender) -> None:
        assert self._events is not None
        with self._lock:
            if self._lenders.get(lender.node.id) is not lender:
                return
            del self._lenders[lender.node.id]
        logger.info("lent memory is gone", node=lender.name, blocks=len(lender.blocks))
        self._events.gone(tuple(lender.blocks))

    def _join(self, node: Node) -> None:
        """One after the other: measurements would slow each other down."""
        assert self._events is not None
        with self._joining:
            before = self._lenders.get(node.id)
            if self._closed or node.leaving or (before is not None and before.node is node):
                return
            if before is not None:  # it has joined anew before its loss was known
                self._lose(before)
            if node.info.lends_bytes < self._block_nbytes + HEAD_BYTES:
                return
            lender = _Lender(node, self._master.new_stage(), self._block_nbytes)
            try:
                node.call(Lend(lender.memory))
                speeds = [measure_peer(lender, self._block_nbytes) for _ in range(_TIMES)]
                lender.speed = max(speeds, key=lambda speed: speed.read_bytes_s)
            except (VRAMancerError, OSError) as error:
                logger.warning("memory of a node is not used", node=node.name, reason=str(error))
                lender.close()
                return
            slow = not self._events.worth(lender.speed)
            logger.info(
                "memory of a node is not used: computing is faster than reading from it" if slow
                else "memory of a node is used",
                node=node.name, bytes=lender.capacity_bytes, read_gb_s=round(lender.speed.read_bytes_s / 1e9, 3),
            )  # fmt: skip
            if slow:
                lender.close()
                return
            if not self._announced:
                self._announced = True
                self._events.found(lender.speed)
            with self._lock:
                if node.lost is None:
                    self._lenders[node.id] = lender

    # -- blocks -----------------------------------------------------------------------------------------------------

    @property
    def capacity_bytes(self) -> int:
        with self._lock:
            return sum(each.capacity_bytes for each in self._lenders.values() if not each.leaves)

    @property
    def used_bytes(self) -> int:
        with self._lock:
            return sum(each.used_bytes for each in self._lenders.values())

    def has_room(self, nbytes: int) -> bool:
        with self._lock:
            return any(each.has_room(nbytes) for each in self._lenders.values())

    def put(self, block: bytes, data: memoryview) -> bool:
        """With the fastest that has room."""
        with self._lock:
            roomy = [each for each in self._lenders.values() if each.has_room(len(data))]
        for lender in sorted(roomy, key=lambda each: -each.speed.read_bytes_s):
            try:
                kept = lender.put(block, data)
            except NetworkError as error:  # it is being lost; whoever notices says so
                logger.debug("a node takes no block", node=lender.name, reason=error.message)
                continue
            if kept:
                with self._lock:
                    if self._lenders.get(lender.node.id) is not lender:
                        continue
                    lender.used_bytes += len(data) - lender.blocks.get(block, 0)
                    lender.blocks[block] = len(data)
                return True
        return False

    def get(self, block: bytes) -> memoryview | None:
        lender = self._holder(block)
        if lender is None:
            return None
        try:
            return lender.get(block)
        except NetworkError as error:
            logger.debug("a node gives no block", node=lender.name, reason=error.message)
            return None

    def drop(self, block: bytes) -> None:
        lender = self._holder(block)
        if lender is None:
            return
        with self._lock:
            lender.used_bytes -= lender.blocks.pop(block, 0)
        try:
            lender.drop(block)
        except NetworkError as error:
            logger.debug("a node that is lost keeps a block", node=lender.name, reason=error.message)

    def _holder(self, block: bytes) -> _Lender | None:
        with self._lock:
            return next((each for each in self._lenders.values() if block in each.blocks), None)

    def settle(self) -> None:
        """Whoever joins from now on is not used, and whoever goes is not told of."""
        with self._joining:
            if self._changed in self._master.on_change:
                self._master.on_change.remove(self._changed)
            self._closed = True

    def close(self) -> None:
        """Safe to call twice."""
        self.settle()
        with self._lock:
            lenders, self._lenders = list(self._lenders.values()), {}
        for lender in lenders:
            lender.close()
