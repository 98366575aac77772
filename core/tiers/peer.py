"""L4: other nodes' RAM. What they offer, and the tier made of it."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from core.logs import get_logger
from core.tiers.compress import Compressor
from core.tiers.records import Tier
from core.tiers.segments import checksum

logger = get_logger(__name__)


class Keeper(Protocol):
    """Keeps blocks by hash. May raise `OSError`."""

    def put(self, block: bytes, data: memoryview) -> bool:
        """Keep a copy of `data`; False when there is no room."""

    def get(self, block: bytes) -> bytes | memoryview | None:
        """The bytes that were put, or None if they are gone."""

    def drop(self, block: bytes) -> None: ...


class Peer(Keeper, Protocol):
    """Other nodes that lend RAM for blocks. Bounded: it refuses what does not fit. After an `OSError` nothing is put
    there any more."""

    name: str

    @property
    def capacity_bytes(self) -> int: ...

    @property
    def used_bytes(self) -> int: ...

    def has_room(self, nbytes: int) -> bool:
        """Whether a block of that size would be kept."""

    def close(self) -> None:
        """This tier uses it no more."""


class PeerBlock(NamedTuple):
    """What is known of a block that a peer keeps: its lossless codec, and the checksum of what was put."""

    parent: bytes
    codec: str
    checksum: int


class PeerStore:
    """The tier made of a peer, of which `kept` is known already: what is put there by another engine, perhaps. Whoever
    gave it takes out what the peer has lost."""

    tier = Tier.L4

    def __init__(
        self, peer: Peer, compressor: Compressor, block_nbytes: int, kept: dict[bytes, PeerBlock] | None = None
    ) -> None:
        self._peer = peer
        self._compressor = compressor
        self._block_nbytes = block_nbytes
        self._kept = kept if kept is not None else {}
        self.stopped: str | None = None

    @property
    def medium(self) -> str:
        return self._peer.name

    @property
    def capacity_bytes(self) -> int:
        return self._peer.capacity_bytes

    @property
    def accepting(self) -> bool:
        return self.stopped is None and self.capacity_bytes >= self._block_nbytes

    @property
    def codec_name(self) -> str:
        return self._compressor.name

    @property
    def used_bytes(self) -> int:
        return self._peer.used_bytes

    def known(self) -> list[tuple[bytes, bytes]]:
        return [(block, each.parent) for block, each in list(self._kept.items())]

    def has_room(self) -> bool:
        return self._peer.has_room(self._block_nbytes)

    def write(self, block: bytes, parent: bytes, payload: memoryview) -> bool:
        codec, data = self._compressor.encode(payload)
        try:
            kept = self._peer.put(block, data)
        except OSError as error:
            self._lose(error)
            return False
        if kept:
            self._kept[block] = PeerBlock(parent, codec, checksum(block, data))
        return kept

    def read(self, block: bytes, into: memoryview) -> bool:
        try:
            data = self._peer.get(block)
        except OSError as error:
            self._lose(error)
            return False
        kept = self._kept.get(block)
        if data is None or kept is None:
            self._kept.pop(block, None)
            logger.info("a peer has a block no more", peer=self._peer.name, block=block.hex())
            return False
        if checksum(block, memoryview(data)) != kept.checksum:
            logger.warning("peer has no block of that content", peer=self._peer.name, block=block.hex())
            return False
        try:
            self._compressor.decode(kept.codec, memoryview(data), into)
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
        self._peer.close()

    def _lose(self, error: OSError) -> None:
        if self.stopped is None:
            logger.warning("peer lost, no more blocks go there", peer=self._peer.name, error=str(error))
        self.stopped = f"peer lost: {error}"
