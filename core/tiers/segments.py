"""The segment file: some blocks of one model, on disk or in an object store.

::

    8 bytes        length of the header, little-endian
    header         JSON, padded with blanks to that length
    data           the blocks, at the offsets the header gives (from the start of the file)

As in safetensors, a reader needs the header alone to know what is there. The header says `format`, `version`, `salt`
(model, dtype, revision and what else the KV depends on, hashed), `layout`, `block_nbytes`, `quantization`, `codec`,
and for each block `block` (its hash), `parent`, `offset`, `length`, `checksum` and the lossless `codec` it was stored
with. The checksum is the CRC-32 of the block's hash and its stored bytes: a block that ended up under another's name
does not pass either.
"""

from __future__ import annotations

import json
import time
import uuid
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from core.errors import ConfigError
from core.tiers.records import Tier

FORMAT = "vramancer-kv"
VERSION = 1
SUFFIX = ".kvseg"
PREFIX_BYTES = 8
ENTRY_BYTES = 208
"""Most that one block's entry takes in the header: 64 hex digits, four numbers, a codec, the keys."""

LARGEST_SEGMENT_BYTES = 64 << 20
_FIXED_BYTES = 512
_MAX_HEADER_BYTES = 64 << 20
_ALIGNMENT = 64


class DamagedSegmentError(ValueError):
    """The file is no segment, or not a whole one."""


class ForeignSegmentError(ValueError):
    """A segment of another model, layout or version."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a segment's blocks must agree in with the model that is served."""

    salt: str
    layout: str
    block_nbytes: int
    quantization: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One block in a segment: its stored bytes are `[offset, offset + length)` of the file."""

    block: bytes
    parent: bytes
    offset: int
    length: int
    checksum: int
    codec: str


def checksum(block: bytes, data: memoryview) -> int:
    """CRC-32 of a block's hash followed by its stored bytes."""
    return zlib.crc32(data, zlib.crc32(block))


@dataclass(frozen=True, slots=True)
class SegmentSizes:
    """How a capacity is divided, in bytes: a `segment` of at most so many blocks, `room` for its header, `reserve` to
    clean into, `usable` by blocks that live."""

    segment: int
    most_blocks: int
    room: int
    reserve: int
    usable: int

    @classmethod
    def of(cls, tier: Tier, capacity_bytes: int, block_nbytes: int) -> SegmentSizes:
        """Raises `ConfigError` if no block fits."""
        block_bytes = block_nbytes + ENTRY_BYTES
        segment = max(min(LARGEST_SEGMENT_BYTES, capacity_bytes // 16), block_bytes)
        blocks = max(1, segment // block_bytes)
        room = -(-(PREFIX_BYTES + _FIXED_BYTES + blocks * ENTRY_BYTES) // _ALIGNMENT) * _ALIGNMENT
        reserve = segment + block_bytes + room
        usable = capacity_bytes - max(reserve + 2 * room, capacity_bytes // 8)
        if usable < block_bytes:
            least = reserve + 2 * room + block_bytes
            raise ConfigError(f"{tier.name} needs at least {least} bytes for blocks of {block_nbytes}")
        return cls(segment, blocks, room, reserve, usable)


def encode_header(identity: Identity, codec: str, entries: Sequence[Entry], room: int) -> bytes:
    """Length and header, exactly `room` bytes."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        **asdict(identity),
        "codec": codec,
        "blocks": [{**asdict(entry), "block": entry.block.hex(), "parent": entry.parent.hex()} for entry in entries],
    }
    text = json.dumps(document, separators=(",", ":")).encode()
    if len(text) > room - PREFIX_BYTES:
        raise ValueError(f"a header of {len(text)} bytes does not fit into {room}")
    return (room - PREFIX_BYTES).to_bytes(PREFIX_BYTES, "little") + text.ljust(room - PREFIX_BYTES)


def read_header(read: Callable[[int, int], bytes], nbytes: int, identity: Identity) -> tuple[list[Entry], int]:
    """The blocks of a segment of `nbytes` bytes that lie within it, and how many do not (it was cut off).

    `read(offset, length)` gives bytes of the file. Raises `DamagedSegmentError` or `ForeignSegmentError`.
    """
    length = int.from_bytes(read(0, PREFIX_BYTES), "little")
    if nbytes < PREFIX_BYTES or not 2 <= length <= min(nbytes - PREFIX_BYTES, _MAX_HEADER_BYTES):
        raise DamagedSegmentError("no header")
    try:
        document = json.loads(read(PREFIX_BYTES, length))
        if document["format"] != FORMAT:
            raise DamagedSegmentError("not a segment")
        if document["version"] != VERSION:
            raise ForeignSegmentError(f"version {document['version']}")
        differing = [name for name, value in asdict(identity).items() if document[name] != value]
        if differing:
            raise ForeignSegmentError(f"another {', '.join(differing)}")
        entries = [_read_entry(fields) for fields in document["blocks"]]
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DamagedSegmentError(f"unreadable header: {error!r}") from error
    start = PREFIX_BYTES + length
    whole = [entry for entry in entries if start <= entry.offset and 0 < entry.length <= nbytes - entry.offset]
    return whole, len(entries) - len(whole)


def _read_entry(fields: dict[str, Any]) -> Entry:
    offset, length, expected, codec = (fields[name] for name in ("offset", "length", "checksum", "codec"))
    if not all(type(number) is int for number in (offset, length, expected)) or not isinstance(codec, str):
        raise DamagedSegmentError("a block's entry has a field of the wrong type")
    try:
        block, parent = bytes.fromhex(fields["block"]), bytes.fromhex(fields["parent"])
    except ValueError as error:
        raise DamagedSegmentError("a block's hash is no hex number") from error
    return Entry(block, parent, offset, length, expected, codec)


def new_name() -> str:
    """A name that no other process takes; names sort by age."""
    return f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}{SUFFIX}"


class OpenFile(Protocol):
    """A segment that is being written, under a name that nobody looks for."""

    def write_at(self, offset: int, data: bytes | memoryview) -> None: ...

    def read_at(self, offset: int, into: memoryview) -> int: ...

    def seal(self) -> str:
        """Make it lasting and give it its name, which is returned. It can still be read here until `close`."""

    def close(self) -> None: ...

    def discard(self) -> None:
        """Close it and remove what was written."""


class SegmentFiles(Protocol):
    """Where segment files are kept: what `SegmentStore` asks of a directory or an object store. Raises `OSError`."""

    def list(self) -> list[tuple[str, int]]:
        """Names, which sort by age, and bytes."""

    def read(self, name: str, offset: int, into: memoryview) -> int:
        """Fill `into` from the file; bytes read, fewer at its end."""

    def start(self) -> OpenFile: ...

    def delete(self, name: str) -> None: ...

    def free_bytes(self) -> int | None:
        """Bytes that can still be written there; None if that is not known."""

    def close(self) -> None: ...
