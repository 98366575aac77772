"""Bytes of frames into sockets and out of them, large payloads piece by piece."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence

from core.errors import LinkLostError, ProtocolError
from core.network.connection import Connection
from core.network.frames import HEADER_BYTES, MIB, TRAILER_BYTES, Buffer, Flag, Header, Sum, check_payload

_PIECE_BYTES = MIB
"""Of a payload that is summed while it travels: few enough calls, and still in a cache when it is sent."""
_AHEAD_BYTES = 32 << 10
"""That are read together with a header, as far as they are there: hidden states of a step that decodes. What is read
ahead is copied once more."""
_TRAILED = int(Flag.TRAILED)  # an enum's `&` takes a while
_WAIT_ALL = getattr(socket, "MSG_WAITALL", 0)


def send_all(sock: Connection, parts: list[Buffer]) -> None:
    """All bytes of all parts, in as few calls as the kernel needs."""
    if not hasattr(sock, "sendmsg"):  # Windows
        for part in parts:
            sock.sendall(part)
        return
    sent = sock.sendmsg(parts)
    if sent == sum(map(len, parts)):  # of views of bytes
        return
    views = [memoryview(part) for part in parts]
    while views:
        while views and sent >= len(views[0]):
            sent -= len(views.pop(0))
        if sent:
            views[0] = views[0][sent:]
        sent = sock.sendmsg(views) if views else 0


def send_summed(sock: Connection, head: bytes, parts: Sequence[memoryview]) -> None:
    """A large payload piece by piece, its checksum behind it: the other end reads a piece while the next is summed."""
    total = Sum()
    first: list[Buffer] = [head]
    for part in parts:
        for offset in range(0, len(part), _PIECE_BYTES):
            piece = part[offset : offset + _PIECE_BYTES]
            total.add(piece)
            send_all(sock, [*first, piece])
            first = []
    send_all(sock, [total.trailer()])


class Source:
    """What comes over a connection. A header is read together with what is there behind it, so that a small frame takes
    one call; what remains of a payload goes straight where it belongs. One thread at a time."""

    def __init__(self, sock: Connection) -> None:
        self._socket = sock
        self._ahead = memoryview(bytearray(HEADER_BYTES + _AHEAD_BYTES))
        self._begin = self._end = 0
        self._held: Callable[[], bool] | None = getattr(sock, "has_bytes", None)  # of one that encrypts

    def has_bytes(self) -> bool:
        """Whether something is here already, of which the socket knows nothing any more."""
        return self._begin < self._end or (self._held is not None and self._held())

    def head(self) -> memoryview:
        """The next header's bytes, until the next call. Raises `LinkLostError` if the other end closes before."""
        if self._end - self._begin < HEADER_BYTES:
            left = self._end - self._begin
            self._ahead[:left] = self._ahead[self._begin : self._end]
            self._begin, self._end = 0, left
            while self._end < HEADER_BYTES:
                self._end += _received(self._socket, self._ahead[self._end :], 0)
        head = self._ahead[self._begin : self._begin + HEADER_BYTES]
        self._begin += HEADER_BYTES
        return head

    def fill(self, view: memoryview) -> None:
        """All of the view. Raises `LinkLostError` if the other end closes before."""
        here = min(self._end - self._begin, len(view))
        if here:
            view[:here] = self._ahead[self._begin : self._begin + here]
            self._begin += here
            view = view[here:]
        while view:
            view = view[_received(self._socket, view, _WAIT_ALL) :]

    def skip(self, nbytes: int) -> None:
        """Drop so many bytes. Raises `LinkLostError` as `fill` does."""
        scratch = memoryview(bytearray(min(nbytes, 1 << 16)))
        while nbytes:
            part = scratch[: min(nbytes, len(scratch))]
            self.fill(part)
            nbytes -= len(part)


def _received(sock: Connection, view: memoryview, flags: int) -> int:
    """How many bytes have come into the view, at least one."""
    received = sock.recv_into(view, 0, flags)
    if not received:
        raise LinkLostError("the other end has closed the connection")
    return received


def receive_payload(source: Source, header: Header, payload: memoryview) -> None:
    """All of it, checked. Raises `ProtocolError` if it is not what was sent, and what `Source.fill` does."""
    if not header.flags & _TRAILED:
        source.fill(payload)
        check_payload(header, payload)
        return
    total = Sum()
    for offset in range(0, len(payload), _PIECE_BYTES):
        piece = payload[offset : offset + _PIECE_BYTES]
        source.fill(piece)
        total.add(piece)
    trailer = memoryview(bytearray(TRAILER_BYTES))
    source.fill(trailer)
    if trailer != total.trailer():
        raise ProtocolError(f"{header.opcode.name}: the payload's checksum is wrong")
