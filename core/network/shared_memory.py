"""Large payloads between two processes of one host: through memory that both see instead of through the kernel.

Each direction of a link has its own region. Whoever sends makes it when there is first something large to send, and
offers it over the connection; the other end opens it, or declines, and then everything travels as before. A region has
no name, so nothing is left behind by a process that is killed, and it is sealed, so that it cannot shrink under the
other end's feet. Headers still go over the connection, and so does a byte once all of a payload is there: the order of
frames, and the end of a link, are what they are without it.

::

    offset  size  field
    0       32    a nonce, that of the offer
    64      8     bytes that the sender has copied in so far
    128     8     bytes that the receiver has copied out so far
    4096          the ring

A payload's bytes follow each other from the offset that is told after its header, and go on at the ring's beginning
where it ends. The receiver copies out what is there while the rest is copied in. Only on processors that let others see
what is written in the order in which it was written: the counters are plain numbers in memory.
"""

from __future__ import annotations

import mmap
import os
import platform
import secrets
import socket
import stat
import struct
import sys
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import structlog

from core.errors import ProtocolError
from core.network.connection import Connection
from core.network.frames import MIB
from core.network.sockets import Source, send_all

if sys.platform == "linux":
    import fcntl

logger = structlog.get_logger(__name__)

Bytes = npt.NDArray[np.uint8]

RING_BYTES = 64 * MIB
LEAST_BYTES = 256 << 10
"""Of a payload that goes this way: below, the kernel is as quick."""
PIECE_BYTES = 512 << 10
"""After which the other end may begin to copy."""
_PATIENCE_S = 200e-6
"""That the receiver looks for the next piece before it lets itself be woken."""
_ORDERED = platform.machine() in ("x86_64", "AMD64")
_HEAD_BYTES = 4096
_NONCE_BYTES = 32
_OFFER = struct.Struct(f"<IIQ{_NONCE_BYTES}s")
_OFFSET = struct.Struct("<Q")
_ALL_THERE = b"\1"
OFFER_BYTES = _OFFER.size


class _Region:
    """What both ends map."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, _HEAD_BYTES + RING_BYTES)
        everything = np.frombuffer(self._map, dtype=np.uint8)
        self.nonce: Bytes = everything[:_NONCE_BYTES]
        self.put: npt.NDArray[np.uint64] = everything[64:72].view(np.uint64)
        self.copied: npt.NDArray[np.uint64] = everything[128:136].view(np.uint64)
        self.ring: Bytes = everything[_HEAD_BYTES:]

    def spans(self, offset: int, nbytes: int) -> list[Bytes]:
        """The ring's bytes from there on, in one part or two."""
        first = self.ring[offset : offset + nbytes]
        return [first] if len(first) == nbytes else [first, self.ring[: nbytes - len(first)]]


class _Outgoing:
    """The sender's end of a region."""

    def __init__(self) -> None:
        """Raises `OSError` where there can be none."""
        self._fd = os.memfd_create("vramancer-link", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, _HEAD_BYTES + RING_BYTES)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._region = _Region(self._fd)
        except BaseException:
            os.close(self._fd)
            raise
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._region.nonce[:] = np.frombuffer(self._nonce, dtype=np.uint8)
        self._sent = self._offset = 0
        self.is_accepted = self.is_answered = False

    def offer(self) -> bytes:
        """What the other end needs to open it."""
        return _OFFER.pack(os.getpid(), self._fd, RING_BYTES, self._nonce)

    def answered(self, accepted: bool) -> None:
        """The other end has opened it, or it will not be used."""
        self.is_accepted, self.is_answered = accepted, True
        os.close(self._fd)

    def has_room(self, nbytes: int) -> bool:
        waiting = self._sent - int(self._region.copied[0])
        return 0 <= waiting <= RING_BYTES - nbytes

    def send(self, sock: Connection, head: bytes, parts: Sequence[memoryview]) -> None:
        """A payload that there is room for, and the header before it. Raises `OSError`."""
        if int(self._region.copied[0]) == self._sent:
            self._offset = 0  # memory that has been used, and is likely still in a cache
        send_all(sock, [head, _OFFSET.pack(self._offset)])
        for part in parts:
            data = np.frombuffer(part, dtype=np.uint8)
            for start in range(0, len(data), PIECE_BYTES):
                self._put(data[start : start + PIECE_BYTES])
        send_all(sock, [_ALL_THERE])

    def _put(self, piece: Bytes) -> None:
        done = 0
        for span in self._region.spans(self._offset, len(piece)):
            np.copyto(span, piece[done : done + len(span)])  # other threads run meanwhile
            done += len(span)
        self._offset = (self._offset + done) % RING_BYTES
        self._sent += done
        self._region.put[0] = self._sent


class _Incoming:
    """The receiver's end of a region."""

    def __init__(self, offer: bytes) -> None:
        """Raises `OSError` and `ValueError` if it cannot be opened, or is not what was offered."""
        pid, fd, ring_bytes, nonce = _OFFER.unpack(offer)
        if ring_bytes != RING_BYTES:
            raise ValueError(f"a ring of {ring_bytes} bytes instead of {RING_BYTES}")
        own = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            _check(own)
            self._region = _Region(own)
        finally:
            os.close(own)
        if self._region.nonce.tobytes() != nonce:
            raise ValueError("it belongs to somebody else")
        self._copied = 0
        self._has_been_told = False

    def receive(self, source: Source, nbytes: int, payload: memoryview | None) -> None:
        """A payload, after its header; None: it is dropped. Raises what `Source.fill` does, and `ProtocolError`."""
        told = memoryview(bytearray(_OFFSET.size))
        source.fill(told)
        (offset,) = _OFFSET.unpack(told)
        if offset >= RING_BYTES or nbytes > RING_BYTES:
            raise ProtocolError(f"{nbytes} bytes from {offset} on are not within a ring of {RING_BYTES}")
        into = None if payload is None else np.frombuffer(payload, dtype=np.uint8)
        begin, done = self._copied, 0
        while done < nbytes:
            there = self._wait_for_more(source, told, begin + done, begin + nbytes) - begin
            if into is not None:
                self._get(into[done:there], (offset + done) % RING_BYTES)
            done = there
            self._copied = begin + done
            self._region.copied[0] = self._copied
        if not self._has_been_told:
            source.fill(told[:1])
        self._has_been_told = False

    def _wait_for_more(self, source: Source, scratch: memoryview, than: int, up_to: int) -> int:
        """How far a payload is there, more than it was. Looks for a moment, and is woken at the latest when all is."""
        deadline_s = time.perf_counter() + _PATIENCE_S
        while (there := min(int(self._region.put[0]), up_to)) <= than:
            if time.perf_counter() < deadline_s:
                time.sleep(0)  # other threads may run
            elif self._has_been_told:
                raise ProtocolError("a payload is said to be in shared memory, and is not")
            else:
                source.fill(scratch[:1])
                self._has_been_told = True
        return there

    def _get(self, into: Bytes, offset: int) -> None:
        done = 0
        for span in self._region.spans(offset, len(into)):
            np.copyto(into[done : done + len(span)], span)  # other threads run meanwhile
            done += len(span)


def _check(fd: int) -> None:
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_size != _HEAD_BYTES + RING_BYTES:
        raise ValueError("it is not memory of this size")
    if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:  # OSError for what is a file
        raise ValueError("it could shrink")


class SharedMemory:
    """What a link needs of both directions' regions. One thread may send, and another one receive."""

    def __init__(self, sock: Connection) -> None:
        self._possible = may_be_on_one_host(sock)
        self._outgoing: _Outgoing | None = None
        self._incoming: _Incoming | None = None

    def offer(self, nbytes: int) -> bytes | None:
        """What to offer the other end before a payload is sent; None if it has been, or there is nothing to offer."""
        if not self._possible or self._outgoing is not None or nbytes < LEAST_BYTES:
            return None
        try:
            self._outgoing = _Outgoing()
        except OSError as error:
            logger.debug("there is no memory to share with another process", reason=str(error))
            self._possible = False
            return None
        return self._outgoing.offer()

    def answered(self, accepted: bool) -> None:
        """By the other end. Raises `ProtocolError` if it was not asked."""
        if self._outgoing is None or self._outgoing.is_answered:
            raise ProtocolError("memory is accepted that was not offered")
        self._outgoing.answered(accepted)

    def open(self, offer: bytes) -> bool:
        """Whether what the other end offers can be used. Raises `ProtocolError` for a second offer, or none."""
        if len(offer) != OFFER_BYTES or self._incoming is not None:
            raise ProtocolError(f"an offer of memory with {len(offer)} bytes, or a second one")
        if self._possible:
            try:
                self._incoming = _Incoming(offer)
            except (OSError, ValueError) as error:
                logger.debug("memory that was offered is not used", reason=str(error))
        return self._incoming is not None

    def takes(self, nbytes: int) -> bool:
        """Whether a payload can go this way now."""
        outgoing = self._outgoing
        return nbytes >= LEAST_BYTES and outgoing is not None and outgoing.is_accepted and outgoing.has_room(nbytes)

    def send(self, sock: Connection, head: bytes, parts: Sequence[memoryview]) -> None:
        """A payload that is taken, and the header before it. Raises `OSError`."""
        assert self._outgoing is not None
        self._outgoing.send(sock, head, parts)

    def receive(self, source: Source, nbytes: int, payload: memoryview | None) -> None:
        """A payload, after its header; None: it is dropped. Raises what `Source.fill` does, and `ProtocolError`."""
        if self._incoming is None:
            raise ProtocolError("a payload in memory that was not offered")
        self._incoming.receive(source, nbytes, payload)

    def close(self) -> None:
        """The link has ended, and nobody sends or receives any more."""
        if self._outgoing is not None and not self._outgoing.is_answered:
            self._outgoing.answered(False)
        self._outgoing = self._incoming = None
        self._possible = False


def may_be_on_one_host(sock: Connection) -> bool:
    """Whether it is worth to offer memory; that the other end sees it is found out then."""
    if sys.platform != "linux" or not _ORDERED:
        return False
    if sock.family == socket.AF_UNIX:
        return True
    try:
        return bool(sock.getpeername()[0] == sock.getsockname()[0])
    except OSError:
        return False
