"""Blocks of KV on their way to a worker's main memory and back: what the frames of a `blocks` link hold.

::

    KV_PAGES   master -> worker   keep this          24 bytes of head, then the bytes of the block, or of its part
    KV_WANTED  master -> worker   send, or let go    24 bytes of head
    KV_ANSWER  worker -> master   to either          4 bytes: 1, or 0 for what is not there; then what was asked for

    head   offset  size
           0       16    hash of the block
           16      4     number of its slot; 0 in memory without slots
           20      1     0: send it; 1: let it go; in KV_PAGES always 0
           21      3     0

`layer` of a header is the number of the memory that is meant, `step` that of the request. Integers are unsigned and
little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from core.errors import ProtocolError
from core.network.frames import Buffer, Opcode
from core.network.link import Link

HASH_BYTES = 16
_HEAD = struct.Struct("<16sIB3s")
HEAD_BYTES = _HEAD.size
_SEND, _LET_GO = 0, 1
_ANSWER = struct.Struct("<B3s")
ANSWER_BYTES = _ANSWER.size
_ZEROS = bytes(3)


@dataclass(frozen=True, slots=True)
class BlockRef:
    """A block that is sent or asked for. `lets_go`: it is wanted no more."""

    block: bytes
    slot: int = 0
    lets_go: bool = False


def send_pages(link: Link, memory: int, request: int, ref: BlockRef, data: Buffer) -> None:
    """Have the other end keep a block."""
    link.send(Opcode.KV_PAGES, [_head(ref), data], step=request, layer=memory)


def send_wanted(link: Link, memory: int, request: int, ref: BlockRef) -> None:
    """Ask for a block, or let it go."""
    link.send(Opcode.KV_WANTED, [_head(ref)], step=request, layer=memory)


def send_answer(link: Link, memory: int, request: int, *, done: bool, data: Buffer = b"") -> None:
    """What became of it."""
    link.send(Opcode.KV_ANSWER, [_ANSWER.pack(done, _ZEROS), data], step=request, layer=memory)


def read_pages(payload: memoryview) -> tuple[BlockRef, memoryview]:
    """Raises `ProtocolError`."""
    ref = _read_head(payload[:HEAD_BYTES])
    if ref.lets_go:
        raise ProtocolError("KV_PAGES let nothing go")
    return ref, payload[HEAD_BYTES:]


def read_wanted(payload: memoryview) -> BlockRef:
    """Raises `ProtocolError`."""
    return _read_head(payload)


def read_answer(payload: memoryview) -> memoryview | None:
    """What was asked for; None for what is not there, or could not be done. Raises `ProtocolError`."""
    if len(payload) < ANSWER_BYTES:
        raise ProtocolError(f"KV_ANSWER of {len(payload)} bytes")
    done, zeros = _ANSWER.unpack(payload[:ANSWER_BYTES])
    if done > 1 or zeros != _ZEROS or (not done and len(payload) > ANSWER_BYTES):
        raise ProtocolError("KV_ANSWER says neither yes nor no")
    return payload[ANSWER_BYTES:] if done else None


def _head(ref: BlockRef) -> bytes:
    if len(ref.block) != HASH_BYTES:
        raise ValueError(f"a block's hash has {HASH_BYTES} bytes, got {len(ref.block)}")
    return _HEAD.pack(ref.block, ref.slot, _LET_GO if ref.lets_go else _SEND, _ZEROS)


def _read_head(head: memoryview) -> BlockRef:
    if len(head) != HEAD_BYTES:
        raise ProtocolError(f"a block is named in {HEAD_BYTES} bytes, got {len(head)}")
    block, slot, what, zeros = _HEAD.unpack(head)
    if what not in (_SEND, _LET_GO) or zeros != _ZEROS:
        raise ProtocolError(f"nothing is asked for by {what}")
    return BlockRef(block, slot, what == _LET_GO)
