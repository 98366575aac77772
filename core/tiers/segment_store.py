"""A tier made of segment files: blocks are appended to an open segment, which is sealed when it is full.

Files together never exceed the capacity: room for one segment is always left for cleaning, which moves what lives in a
segment that is mostly dead to the open one and deletes it. So up to an eighth of the capacity, and at least a segment,
holds no live block. Segments of another model, and files that cannot be read, count too and go first, oldest first.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from core.devices import format_bytes
from core.logs import get_logger
from core.tiers.compress import Compressor
from core.tiers.records import Tier
from core.tiers.segments import (
    ENTRY_BYTES,
    DamagedSegmentError,
    Entry,
    ForeignSegmentError,
    Identity,
    OpenFile,
    SegmentFiles,
    SegmentSizes,
    checksum,
    encode_header,
    read_header,
)

logger = get_logger(__name__)

MOSTLY_DEAD = 0.25
"""Share of a segment that lives, below which it is cleaned at once."""

RETRY_S = 60.0
"""After a failed write, seconds until the next attempt."""


@dataclass(slots=True, eq=False)
class Segment:
    """A segment and its live blocks. `open` until it is sealed; `name` afterwards."""

    nbytes: int
    name: str = ""
    open: OpenFile | None = None
    entries: dict[bytes, Entry] = field(default_factory=dict)
    live_bytes: int = 0
    blocks_written: int = 0


class SegmentStore:
    """A `BlockStore` over `SegmentFiles`. Reads from any thread, everything else from one.

    `capacity_bytes` bounds all files together; below `min_free_bytes` of free space nothing is written.
    """

    def __init__(
        self,
        tier: Tier,
        files: SegmentFiles,
        capacity_bytes: int,
        identity: Identity,
        compressor: Compressor,
        *,
        min_free_bytes: int = 0,
        medium: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Scans what is there. Raises `OSError` if it cannot be listed, `ConfigError` if the capacity is too small."""
        self.tier = tier
        self.medium = medium
        self.stopped: str | None = None
        self._files = files
        self.capacity_bytes = capacity_bytes
        self._min_free_bytes = min_free_bytes
        self._identity = identity
        self._compressor = compressor
        self._clock = clock
        self._retry_at_s = 0.0
        self._sizes = SegmentSizes.of(tier, capacity_bytes, identity.block_nbytes)
        self._lock = threading.Lock()
        self._where: dict[bytes, Segment] = {}
        self._segments: list[Segment] = []  # oldest first; the open one is the last
        self._foreign: list[tuple[str, int]] = []
        self._live_bytes = 0
        self._scan()

    # -- what is there ----------------------------------------------------------------------------------------------

    @property
    def accepting(self) -> bool:
        return self.stopped is None or self._clock() >= self._retry_at_s

    @property
    def used_bytes(self) -> int:
        """Bytes of all files, other models' included."""
        return sum(segment.nbytes for segment in list(self._segments)) + sum(nbytes for _, nbytes in self._foreign)

    @property
    def codec_name(self) -> str:
        return self._compressor.name

    def known(self) -> list[tuple[bytes, bytes]]:
        return [(entry.block, entry.parent) for segment in self._segments for entry in segment.entries.values()]

    def _scan(self) -> None:
        for name, nbytes in sorted(self._files.list()):
            try:
                entries, cut_off = read_header(partial(self._part, name), nbytes, self._identity)
            except ForeignSegmentError as error:
                logger.info("segment of something else is left alone", file=name, reason=str(error))
                self._foreign.append((name, nbytes))
                continue
            except (DamagedSegmentError, OSError) as error:
                logger.warning("damaged segment is skipped", tier=self.tier.name, file=name, reason=str(error))
                self._foreign.append((name, nbytes))
                continue
            if cut_off:
                logger.warning("segment is cut off", tier=self.tier.name, file=name, blocks_lost=cut_off)
            segment = Segment(nbytes, name)
            self._segments.append(segment)
            for entry in entries:
                self._place(segment, entry)
        while self.used_bytes > self.capacity_bytes:
            self._remove_oldest()
        if self._where:
            logger.info("blocks found from before", tier=self.tier.name, blocks=len(self._where))

    def _remove_oldest(self) -> None:
        if self._foreign:
            self._files.delete(self._foreign.pop(0)[0])
            return
        self._delete(self._segments[0])

    def _delete(self, segment: Segment) -> None:
        self._lose(segment)
        self._files.delete(segment.name)

    def _part(self, name: str, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        return bytes(buffer[: self._files.read(name, offset, memoryview(buffer))])

    def _place(self, segment: Segment, entry: Entry) -> None:
        self._forget(entry.block)
        segment.entries[entry.block] = entry
        segment.live_bytes += entry.length
        self._where[entry.block] = segment
        self._live_bytes += entry.length + ENTRY_BYTES

    def _forget(self, block: bytes) -> Segment | None:
        segment = self._where.pop(block, None)
        if segment is not None:
            length = segment.entries.pop(block).length
            segment.live_bytes -= length
            self._live_bytes -= length + ENTRY_BYTES
        return segment

    # -- reading ----------------------------------------------------------------------------------------------------

    def read(self, block: bytes, into: memoryview) -> bool:
        for last_try in (False, True):  # cleaning may move it between looking it up and opening the file
            with self._lock:
                segment = self._where.get(block)
                if segment is None:
                    return False
                entry = segment.entries[block]
                direct = entry.codec == "none" and entry.length == len(into)
                data = into if direct else memoryview(bytearray(entry.length))
                # An open segment is read under the lock, so that it is not sealed and closed meanwhile.
                count = segment.open.read_at(entry.offset, data) if segment.open is not None else None
            try:
                if count is None:
                    count = self._files.read(segment.name, entry.offset, data)
            except OSError as error:
                if isinstance(error, FileNotFoundError) and not last_try:
                    continue
                return self._reject(segment, entry, f"cannot be read: {error}")
            return self._check(segment, entry, data[:count]) and (direct or self._decode(segment, entry, data, into))
        return False

    def _check(self, segment: Segment, entry: Entry, data: memoryview) -> bool:
        whole = len(data) == entry.length
        if whole and checksum(entry.block, data) == entry.checksum:
            return True
        return self._reject(segment, entry, "checksum differs" if whole else "cut off")

    def _decode(self, segment: Segment, entry: Entry, data: memoryview, into: memoryview) -> bool:
        try:
            self._compressor.decode(entry.codec, data, into)
        except ValueError as error:
            return self._reject(segment, entry, str(error))
        return True

    def _reject(self, segment: Segment, entry: Entry, reason: str) -> bool:
        """Forget a block that cannot be used; it will be computed again."""
        with self._lock:
            if self._where.get(entry.block) is segment:
                self._forget(entry.block)
        logger.warning(
            "damaged block is skipped", tier=self.tier.name, file=segment.name, block=entry.block.hex(), reason=reason
        )
        return False

    # -- writing ----------------------------------------------------------------------------------------------------

    def has_room(self) -> bool:
        if self._live_bytes + self._identity.block_nbytes + ENTRY_BYTES > self._sizes.usable:
            return False
        try:
            return self._make_space(self._identity.block_nbytes)
        except OSError as error:
            self._stop(error)
            return True  # evicting would not help; `write` is going to say so

    def write(self, block: bytes, parent: bytes, payload: memoryview) -> bool:
        codec, data = self._compressor.encode(payload)
        try:
            if not self._make_space(len(data)):
                return False
            self._append(Entry(block, parent, 0, len(data), checksum(block, data), codec), data)
        except OSError as error:
            self._stop(error)
            return False
        if self.stopped is not None:
            logger.info("blocks are written again", tier=self.tier.name)
            self.stopped = None
        return True

    def _stop(self, error: OSError) -> None:
        reason = error.strerror or str(error)
        if self.stopped is None:
            logger.warning("no more blocks are written", tier=self.tier.name, reason=reason, retry_s=RETRY_S)
        self.stopped = reason
        self._retry_at_s = self._clock() + RETRY_S

    def _make_space(self, nbytes: int) -> bool:
        """Delete and clean until `nbytes` more and a segment to clean into fit; False if too little of it is dead."""
        while self.used_bytes + self._sizes.room + nbytes + self._sizes.reserve > self.capacity_bytes:
            if self._foreign:
                self._remove_oldest()
                continue
            sealed = (segment for segment in self._segments if segment.open is None)
            emptiest = max(sealed, key=self._dead_bytes, default=None)
            if emptiest is None or self._dead_bytes(emptiest) < max(1, self._sizes.segment // 64):
                return False
            self._clean(emptiest)
        return True

    def _dead_bytes(self, segment: Segment) -> int:
        return segment.nbytes - self._sizes.room - segment.live_bytes

    def _append(self, entry: Entry, data: memoryview) -> None:
        """Add a block, whose offset is not known yet, to the open segment, and seal that if it is then full."""
        segment = self._open_segment()
        assert segment.open is not None
        offset = segment.nbytes
        segment.open.write_at(offset, data)
        with self._lock:
            segment.nbytes += len(data)
            self._place(segment, replace(entry, offset=offset))
            segment.blocks_written += 1
        sizes = self._sizes
        if segment.nbytes - sizes.room >= sizes.segment or segment.blocks_written >= sizes.most_blocks:
            self._seal(segment)

    def _open_segment(self) -> Segment:
        if self._segments and self._segments[-1].open is not None:
            return self._segments[-1]
        free = self._files.free_bytes()
        if free is not None and free < self._min_free_bytes + self._sizes.segment + self._sizes.room:
            raise OSError(errno.ENOSPC, f"only {format_bytes(free)} of free space are left")
        opened = self._files.start()
        segment = Segment(self._sizes.room, open=opened)
        try:
            opened.write_at(0, bytes(self._sizes.room))  # so that a full disk shows now, not when it is sealed
        except OSError:
            opened.discard()
            raise
        with self._lock:
            self._segments.append(segment)
        return segment

    def _seal(self, segment: Segment) -> None:
        """Write the header and give the file its name. On failure its blocks are lost, and `OSError` is raised."""
        opened = segment.open
        assert opened is not None
        with self._lock:
            entries = sorted(segment.entries.values(), key=lambda entry: entry.offset)
        try:
            opened.write_at(0, encode_header(self._identity, self.codec_name, entries, self._sizes.room))
            name = opened.seal()
        except OSError:
            self._lose(segment)
            opened.discard()
            raise
        with self._lock:  # readers go on with the open file until here
            segment.name, segment.open = name, None
        opened.close()

    def _lose(self, segment: Segment) -> None:
        with self._lock:
            for block in list(segment.entries):
                self._forget(block)
            self._segments.remove(segment)

    def _clean(self, segment: Segment) -> None:
        """Move what lives in a sealed segment to the open one, then delete it."""
        for entry in list(segment.entries.values()):
            data = memoryview(bytearray(entry.length))
            try:
                count = self._files.read(segment.name, entry.offset, data)
            except FileNotFoundError:  # another server that shares the place has removed it
                self._lose(segment)
                return
            except OSError as error:
                logger.warning("a block that cannot be read is given up", segment=segment.name, reason=str(error))
                continue
            if self._check(segment, entry, data[:count]):
                self._append(entry, data)
        self._delete(segment)

    def drop(self, block: bytes) -> None:
        with self._lock:
            segment = self._forget(block)
        if segment is None or segment.open is not None:
            return
        if segment.live_bytes > MOSTLY_DEAD * (segment.nbytes - self._sizes.room):
            return
        try:
            self._clean(segment)
        except OSError as error:
            self._stop(error)

    # -- ending -----------------------------------------------------------------------------------------------------

    def sync(self) -> None:
        """Seal the open segment. A process that ends without this or `close` loses what is in it."""
        for segment in [segment for segment in self._segments if segment.open is not None]:
            try:
                self._seal(segment)
            except OSError as error:
                self._stop(error)

    def close(self) -> None:
        self.sync()
        self._files.close()

    def check_invariants(self) -> None:
        """Raise `AssertionError` unless the map of blocks, the segments and the counters agree."""
        with self._lock:
            where = {block: segment for segment in self._segments for block in segment.entries}
            if where != self._where:
                raise AssertionError("blocks and segments disagree")
            live = [sum(entry.length for entry in segment.entries.values()) for segment in self._segments]
            total = sum(live) + len(where) * ENTRY_BYTES
            if live != [segment.live_bytes for segment in self._segments] or total != self._live_bytes:
                raise AssertionError("live bytes are off")
            if self.used_bytes > self.capacity_bytes:
                raise AssertionError(f"{self.used_bytes} bytes exceed {self.capacity_bytes}")
