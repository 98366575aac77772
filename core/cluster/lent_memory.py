"""L4: the main memory that workers offer, as one place for blocks of a model. Workers come and go; a block is with one
of them, and goes with it. Blocks are whole, so they stay of use when the model moves: the next engine has them."""

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
from core.tiers.peer import PeerBlock
from core.tiers.records import TierSpeed
from core.tiers.segments import Identity

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
    """What becomes of it: `found` hears how fast the first worker is, and the network to it (bytes per second), before
    anything is put there; `gone` of blocks that went with a worker. `worth` says of a worker's speed whether reading a
    block back would beat computing it."""

    found: Callable[[TierSpeed, float], None]
    gone: Callable[[Collection[bytes]], None]
    worth: Callable[[TierSpeed], bool]


class LentMemory:
    """A `Peer`. Workers that offer memory are used from `open` on, and when they join, until `close`; they keep what
    they have until `give_up`. `kept` is known of that. Thread-safe."""

    name = "other machines' memory"

    def __init__(self, master: Master, identity: Identity) -> None:
        self.identity = identity
        self.kept: dict[bytes, PeerBlock] = {}
        self._master = master
        self._block_nbytes = identity.block_nbytes
        self._events: LentMemoryEvents | None = None
        self._lock = threading.Lock()
        self._joining = threading.Lock()
        self._lenders: dict[str, _Lender] = {}
        self._announced = False
        master.on_change.append(self._changed)

    def open(self, events: LentMemoryEvents) -> None:
        """For an engine. Waits for what is measured. Not under anybody's lock: `events` are heard."""
        with self._joining:
            self._events, self._announced = events, False
            with self._lock:
                there = [each for each in self._lenders.values() if not each.leaves]
            if there:
                self._announce(max(there, key=lambda each: each.speed.read_bytes_s))
        for node in self._master.nodes:
            self._join(node)

    def _announce(self, lender: _Lender) -> None:
        if not self._announced and self._events is not None:
            self._announced = True
            self._events.found(lender.speed, lender.node.speed.bandwidth_bytes_s)

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
        with self._lock:
            if self._lenders.get(lender.node.id) is not lender:
                return
            del self._lenders[lender.node.id]
            for block in lender.blocks:
                self.kept.pop(block, None)
            events = self._events
        logger.info("lent memory is gone", node=lender.name, blocks=len(lender.blocks))
        if events is not None:
            events.gone(tuple(lender.blocks))

    def _join(self, node: Node) -> None:
        """One after the other: measurements would slow each other down."""
        with self._joining:
            before = self._lenders.get(node.id)
            if before is not None and before.node is not node:  # it has joined anew before its loss was known
                self._lose(before)
            if self._events is None or node.leaving or (before is not None and before.node is node):
                return
            if node.info.lends_bytes < self._block_nbytes + HEAD_BYTES:
                return
            lender = _Lender(node, self._master.new_stage(), self._block_nbytes)
            try:
                node.call(Lend(lender.memory))
                speeds = [measure_peer(lender, self._block_nbytes) for _ in range(_TIMES)]
                lender.speed = TierSpeed(
                    max(speed.read_bytes_s for speed in speeds), max(speed.write_bytes_s for speed in speeds)
                )
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
            self._announce(lender)
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

    def close(self) -> None:
        """The engine has no use for it any more: whoever joins from now on is not used, and nobody is told of whoever
        goes. Safe to call twice."""
        with self._joining:
            self._events = None

    def give_up(self) -> None:
        """Nothing is kept any more."""
        self.close()
        if self._changed in self._master.on_change:
            self._master.on_change.remove(self._changed)
        with self._lock:
            lenders, self._lenders = list(self._lenders.values()), {}
            self.kept.clear()
        for lender in lenders:
            lender.close()


class LentMemories:
    """What is lent to the model that is served, from one engine of it to the next. Used by one thread at a time."""

    def __init__(self, master: Master) -> None:
        self._master = master
        self._now: LentMemory | None = None

    def take(self, identity: Identity) -> LentMemory:
        """For an engine, once no other has it: with what an engine of the same model has left there."""
        if self._now is None or self._now.identity != identity:
            self.give_up()
            self._now = LentMemory(self._master, identity)
        return self._now

    def give_up(self) -> None:
        """No model has any."""
        if self._now is not None:
            self._now.give_up()
            self._now = None
