"""L4: another node's RAM. What a node offers, and the tier made of it."""

from __future__ import annotations

import threading
from typing import Protocol

from core.logs import get_logger
from core.tiers.compress import Compressor
from core.tiers.records import Tier
from core.tiers.segments import checksum

logger = get_logger(__name__)


class Peer(Protocol):
    """Another node that lends RAM for blocks, by hash. Bounded: it refuses what does not fit. May raise `OSError`."""

    name: str
    capacity_bytes: int

    @property
    def used_bytes(self) -> int: ...

    def put(self, block: bytes, data: memoryview) -> bool:
        """Keep a copy of `data`; False when there is no room."""

    def get(self, block: bytes) -> bytes | None:
        """The bytes that were put, or None if they are gone."""

    def drop(self, block: bytes) -> None: ...


class InProcessPeer:
    """A peer in this process, which keeps the bytes. Thread-safe."""

    name = "in-process"

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._lock = threading.Lock()
        self._data: dict[bytes, bytes] = {}

    def put(self, block: bytes, data: memoryview) -> bool:
        with self._lock:
            grown = self.used_bytes + len(data) - len(self._data.get(block, b""))
            if grown > self.capacity_bytes:
                return False
            self._data[block] = bytes(data)
            self.used_bytes = grown
            return True

    def get(self, block: bytes) -> bytes | None:
        with self._lock:
            return self._data.get(block)

    def drop(self, block: bytes) -> None:
        with self._lock:
            self.used_bytes -= len(self._data.pop(block, b""))


class PeerStore:
    """The tier made of one peer."""

    tier = Tier.L4

    def __init__(self, peer: Peer, compressor: Compressor, block_nbytes: int) -> None:
        self._peer = peer
        self._compressor = compressor
        self._block_nbytes = block_nbytes
        self._kept: dict[bytes, tuple[str, int]] = {}  # lossless codec and checksum of what was put
        self.stopped: str | None = None
        self.medium = f"peer {peer.name}"
        self.capacity_bytes = peer.capacity_bytes

    @property
    def accepting(self) -> bool:
        return self.stopped is None

    @property
    def codec_name(self) -> str:
        return self._compressor.name

    @property
    def used_bytes(self) -> int:
        return self._peer.used_bytes

    def known(self) -> list[tuple[bytes, bytes]]:
        return []

    def has_room(self) -> bool:
        return self._peer.used_bytes + self._block_nbytes <= self.capacity_bytes

    def write(self, block: bytes, parent: bytes, payload: memoryview) -> bool:
        codec, data = self._compressor.encode(payload)
        try:
            kept = self._peer.put(block, data)
        except OSError as error:
            self._lose(error)
            return False
        if kept:
            self._kept[block] = (codec, checksum(block, data))
        return kept

    def read(self, block: bytes, into: memoryview) -> bool:
        try:
            data = self._peer.get(block)
        except OSError as error:
            self._lose(error)
            return False
        codec, expected = self._kept.get(block, ("none", -1))
        if data is None or checksum(block, memoryview(data)) != expected:
            logger.warning("peer has no block of that content", peer=self._peer.name, block=block.hex())
            return False
        try:
            self._compressor.decode(codec, memoryview(data), into)
        except ValueError as error:
            logger.warning("damaged block is skipped", tier=self.tier.name, block=block.hex(), reason=str(error))
            return False
        return True

    def drop(self, block: bytes) -> None:
        self._kept.pop(block, None)
        try:
            self._peer.drop(block)
        except OSError as error:
            self._lose(error)

    def sync(self) -> None:
        """Nothing to do: a peer's RAM is as lasting as the peer."""

    def close(self) -> None:
        """Nothing of this process is held."""

    def _lose(self, error: OSError) -> None:
        if self.stopped is None:
            logger.warning("peer lost, no more blocks go there", peer=self._peer.name, error=str(error))
        self.stopped = f"peer lost: {error}"
