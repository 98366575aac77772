"""The frames of VTP: 64 bytes of header, then the payload. `docs/vtp.md` has the tables for other implementations.

::

    offset  size  field
    0       4     magic, "VTP" and the version as a byte
    4       1     opcode
    5       1     flags
    6       2     reserved, 0
    8       4     epoch: what the membership was when it was sent
    12      2     source node
    14      2     destination node
    16      8     step, request or call
    24      2     layer or stage
    26      1     dtype of the payload, 0: bytes
    27      1     dimensions, 0 to 4
    28      16    shape, four numbers, 0 beyond the dimensions
    44      4     number of the frame on its link
    48      8     bytes of the payload
    56      4     checksum of the payload, 0 if `Flag.CHECKED` is not set: see `Flag.TRAILED`
    60      4     checksum of the 60 bytes before

Integers are unsigned and little-endian. A checksum is the low half of XXH3-64. Everything in a header is checked before
anything is allocated for what it announces.
"""

from __future__ import annotations

import enum
import math
import struct
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import xxhash

from core.errors import ProtocolError

VERSION = 1
MAGIC = b"VTP" + bytes((VERSION,))
HEADER_BYTES = 64
MAX_DIMENSIONS = 4

Buffer: TypeAlias = bytes | bytearray | memoryview

_FIELDS = struct.Struct("<4sBBHIHHQHBB4IIQI")
_WHOLE = struct.Struct(_FIELDS.format + "I")
_CHECKSUM = struct.Struct("<I")
_NO_SHAPE = (0,) * MAX_DIMENSIONS
_digest = xxhash.xxh3_64_intdigest


class Opcode(enum.IntEnum):
    """What a frame is. Below 16: the link's own business, which no epoch and no credit holds back."""

    HELLO = 1
    CHALLENGE = 2
    PROOF = 3
    WELCOME = 4
    REFUSED = 5
    PROBE = 6
    PROBED = 7
    HEARTBEAT = 8
    CREDIT = 9
    BYE = 10
    SHARE = 11
    SHARED = 12
    REACH = 13
    REGION = 14
    TAKEN = 15
    CALL = 16
    ANSWER = 17
    STEP = 20
    HIDDEN = 21
    RESULTS = 22
    SKIP = 23
    FAILED = 24
    PASS = 25
    GROUP = 26
    KV_PAGES = 28
    KV_WANTED = 29
    KV_ANSWER = 30
    WEIGHTS = 32
    WEIGHTS_WANTED = 33
    SITE = 35
    QUERY = 36
    PARTIAL = 37
    ECHO = 40
    ECHOED = 41
    REPORT = 44

    __hash__ = int.__hash__  # an enum's own takes a while, and each frame is looked up several times


_OPCODES = {int(opcode): opcode for opcode in Opcode}
KIB, MIB = 1 << 10, 1 << 20
MAX_PAYLOAD_BYTES: dict[Opcode, int] = {
    Opcode.HELLO: KIB,
    Opcode.CHALLENGE: KIB,
    Opcode.PROOF: KIB,
    Opcode.WELCOME: 4 * KIB,
    Opcode.REFUSED: KIB,
    Opcode.HEARTBEAT: 4 * KIB,
    Opcode.CREDIT: 0,
    Opcode.BYE: KIB,
    Opcode.SHARE: 64,
    Opcode.SHARED: 0,
    Opcode.PROBE: 4 * MIB,
    Opcode.PROBED: 0,
    Opcode.REACH: 0,
    Opcode.REGION: 16 * KIB,
    Opcode.TAKEN: 0,
    Opcode.CALL: 16 * MIB,
    Opcode.ANSWER: 16 * MIB,
    Opcode.STEP: 64 * MIB,
    Opcode.HIDDEN: 1024 * MIB,
    Opcode.RESULTS: 1024 * MIB,
    Opcode.SKIP: 64 * KIB,
    Opcode.FAILED: 64 * KIB,
    Opcode.PASS: 0,
    Opcode.GROUP: 4 * MIB,
    Opcode.KV_PAGES: 256 * MIB,
    Opcode.KV_WANTED: MIB,
    Opcode.KV_ANSWER: 256 * MIB,
    Opcode.WEIGHTS: 16 * MIB,
    Opcode.WEIGHTS_WANTED: MIB,
    Opcode.SITE: 64 * MIB,
    Opcode.QUERY: 256 * MIB,
    Opcode.PARTIAL: 256 * MIB,
    Opcode.ECHO: 64 * MIB,
    Opcode.ECHOED: 64 * MIB,
    Opcode.REPORT: 64 * KIB,
}
"""Of each opcode. A weight's tensor is sent in several frames."""


class Flag(enum.IntFlag):
    """Bits of a header's flags."""

    CHECKED = 1
    """The header has the payload's checksum."""
    TRAILED = 2
    """The payload's checksum follows it, in four bytes: a large one is summed while it travels."""
    LAST = 4
    """The last frame of several that belong together."""
    SHARED = 8
    """The payload is in memory that both ends see: `core/network/shared_memory.py`."""
    REMOTE = 16
    """The payload is in memory of the receiver's that the sender has written to: `core/network/rdma.py`. With `CHECKED`
    alone."""
    ELSEWHERE = 32
    """The frame says what comes, and the payload comes another way: `core/cluster/group_path.py`."""


_CHECKED = int(Flag.CHECKED)  # an enum's `&` takes a while
_WAYS = frozenset(map(int, (0, Flag.CHECKED, Flag.TRAILED, Flag.SHARED, Flag.REMOTE | Flag.CHECKED, Flag.ELSEWHERE)))
_WAY = int(Flag.CHECKED | Flag.TRAILED | Flag.SHARED | Flag.REMOTE | Flag.ELSEWHERE)
_FLAGS = _WAY | int(Flag.LAST)
TRAILER_BYTES = 4
SUMMED_AHEAD_BYTES = 256 << 10
"""Up to which a payload's checksum is in its header. A larger one is summed while it travels."""

DTYPES: dict[str, tuple[int, int]] = {
    "bytes": (0, 1),
    "uint8": (1, 1),
    "int8": (2, 1),
    "int32": (3, 4),
    "int64": (4, 8),
    "float32": (5, 4),
    "float16": (6, 2),
    "bfloat16": (7, 2),
    "float8_e4m3fn": (8, 1),
    "float64": (9, 8),
}
"""Code and bytes of an element, by torch's name."""
_DTYPE_OF = {code: name for name, (code, _) in DTYPES.items()}


class Header(NamedTuple):
    """One frame's header; see the module. `nbytes` is the payload's size."""

    opcode: Opcode
    flags: int = 0
    epoch: int = 0
    source: int = 0
    destination: int = 0
    step: int = 0
    layer: int = 0
    dtype: str = "bytes"
    shape: tuple[int, ...] = ()
    sequence: int = 0
    nbytes: int = 0
    checksum: int = 0


def checksum(parts: Sequence[Buffer]) -> int:
    """Of bytes that follow each other."""
    if len(parts) == 1:
        return _digest(parts[0]) & 0xFFFFFFFF
    state = xxhash.xxh3_64()
    for part in parts:
        state.update(part)
    return state.intdigest() & 0xFFFFFFFF


class Sum:
    """The checksum of bytes that come piece by piece."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_64()

    def add(self, piece: Buffer) -> None:
        self._state.update(piece)

    def trailer(self) -> bytes:
        """What follows a payload."""
        return _CHECKSUM.pack(self._state.intdigest() & 0xFFFFFFFF)


def write_header(header: Header) -> bytes:
    """Its 64 bytes. The caller keeps to the bounds."""
    return pack_header(*header)


def pack_header(
    opcode: Opcode, flags: int, epoch: int, source: int, destination: int, step: int, layer: int, dtype: str,
    shape: tuple[int, ...], sequence: int, nbytes: int, payload_checksum: int,
) -> bytes:  # fmt: skip
    """What `write_header` does, of the fields of a `Header` in their order."""
    first, second, third, fourth = (shape + _NO_SHAPE)[:MAX_DIMENSIONS]
    fields = _FIELDS.pack(
        MAGIC, opcode, flags, 0, epoch, source, destination, step, layer, DTYPES[dtype][0], len(shape), first, second,
        third, fourth, sequence, nbytes, payload_checksum,
    )  # fmt: skip
    return fields + _CHECKSUM.pack(_digest(fields) & 0xFFFFFFFF)


def read_header(data: Buffer) -> Header:
    """The header in 64 bytes. Raises `ProtocolError` with what is wrong, before anything else is believed."""
    if len(data) != HEADER_BYTES:
        raise ProtocolError(f"a header has {len(data)} bytes instead of {HEADER_BYTES}")
    (magic, code, flags, reserved, epoch, source, destination, step, layer, dtype_code, dimensions, first, second,
     third, fourth, sequence, nbytes, payload_checksum, own_checksum) = _WHOLE.unpack(data)  # fmt: skip
    if magic != MAGIC:
        if magic[:3] != MAGIC[:3]:
            raise ProtocolError("this is not VTP")
        raise ProtocolError(f"VTP of version {magic[3]}; this program speaks version {VERSION}")
    if own_checksum != _digest(data[: _FIELDS.size]) & 0xFFFFFFFF:
        raise ProtocolError("a header's checksum is wrong")
    opcode = _OPCODES.get(code)
    if opcode is None:
        raise ProtocolError(f"no opcode is {code}")
    if flags & ~_FLAGS or reserved or flags & _WAY not in _WAYS:
        raise ProtocolError(f"{opcode.name}: bits are set that mean nothing (flags {flags:#x}, reserved {reserved})")
    dtype, shape = _DTYPE_OF.get(dtype_code), (first, second, third, fourth)
    if dtype is None or dimensions > MAX_DIMENSIONS or any(shape[dimensions:]):
        raise ProtocolError(f"{opcode.name}: dtype {dtype_code} with {dimensions} dimensions {list(shape)}")
    if nbytes > MAX_PAYLOAD_BYTES[opcode]:
        check_bound(opcode, nbytes)
    shape = shape[:dimensions]
    if dtype_code:
        if math.prod(shape) * DTYPES[dtype][1] != nbytes:
            raise ProtocolError(f"{opcode.name}: {nbytes} bytes are not {dtype} {list(shape)}")
    elif dimensions:
        raise ProtocolError(f"{opcode.name}: bytes have no shape")
    return Header(
        opcode, flags, epoch, source, destination, step, layer, dtype, shape, sequence, nbytes, payload_checksum
    )


def check_bound(opcode: Opcode, nbytes: int) -> None:
    """Raises `ProtocolError` if no frame may be so large."""
    limit = MAX_PAYLOAD_BYTES[opcode]
    if nbytes > limit:
        raise ProtocolError(f"{opcode.name} of {nbytes} bytes; up to {limit} are allowed")


def check_payload(header: Header, payload: Buffer) -> None:
    """Raises `ProtocolError` if the payload is not what was sent."""
    if header.flags & _CHECKED and _digest(payload) & 0xFFFFFFFF != header.checksum:
        raise ProtocolError(f"{header.opcode.name}: the payload's checksum is wrong")
