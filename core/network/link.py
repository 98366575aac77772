"""`Link`: frames to and from one other node over one connection.

Whoever sends writes to the socket in its own thread, header and payload in one call and without copying. One thread
reads, each payload straight into the buffer that the handler names for it. Payloads count against credit: a sender may
have `WINDOW_BYTES` at the other end that have not been released there, and then waits. So nothing queues without bound,
and a receiver with two buffers takes in the second payload while it works on the first.

A handler is called in the reading thread. It may compute there, and send on other links. On its own it may only answer,
which needs no credit, and only if the other end's reading thread never waits: two that both waited for room to write
would wait for each other. So another thread tells of credit.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import structlog

from core.errors import LinkLostError, NetworkError, ProtocolError
from core.network.frames import (
    HEADER_BYTES,
    PIECE_BYTES,
    TRAILER_BYTES,
    Buffer,
    Flag,
    Header,
    Opcode,
    Sum,
    check_bound,
    check_payload,
    checksum,
    read_header,
    write_header,
)

logger = structlog.get_logger(__name__)

WINDOW_BYTES = 64 << 20
"""Of payloads that one end may have sent and the other not released. Both ends count by the same rule; see `cost`."""
_LEAST_COST = 1 << 10
_TELL_CREDIT_AT = WINDOW_BYTES // 8
_GOODBYE_S = 1.0
_OWN_BUSINESS = frozenset({Opcode.HEARTBEAT, Opcode.CREDIT, Opcode.BYE})
_FREE = _OWN_BUSINESS | {Opcode.ANSWER, Opcode.RESULTS, Opcode.FAILED, Opcode.PARTIAL, Opcode.ECHOED}
"""Needs no credit: whoever asked has room for the answer."""


def cost(nbytes: int) -> int:
    """What a payload takes of the window: its bytes, at least 1 KiB; one larger than the window takes all of it."""
    return min(max(nbytes, _LEAST_COST), WINDOW_BYTES)


class LinkHandler(Protocol):
    """What becomes of what arrives. All but `lost` are called in the link's thread."""

    def buffer_for(self, header: Header) -> memoryview | None:
        """Where the payload goes, `header.nbytes` bytes or more; None: into a buffer of its own. Raises `ProtocolError`
        for what is not expected."""

    def received(self, header: Header, payload: memoryview) -> bool:
        """A frame is there. Whether its payload is done with; if not, `Link.release(header)` says so later."""

    def lost(self, error: NetworkError) -> None:
        """Once, from whichever thread noticed."""


@dataclass(slots=True)
class LinkStats:
    """Since the link began; payload bytes alone. `stale` are frames of another epoch, which are dropped."""

    sent_frames: int = 0
    sent_bytes: int = 0
    received_frames: int = 0
    received_bytes: int = 0
    stale: int = 0


class Link:
    """One connection after the handshake; `start` begins to read. `own` and `peer` are the nodes' numbers.

    With `heartbeat_s` the other end hears of this one so often, whatever else there is to say. `heard_s` is when the
    other end was heard of, by `time.monotonic()`.
    """

    def __init__(
        self, sock: socket.socket, own: int, peer: int, handler: LinkHandler, *, name: str,
        heartbeat_s: float | None = None,
    ) -> None:  # fmt: skip
        sock.settimeout(None)
        with contextlib.suppress(OSError):  # not every kind of socket has it
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.name = name
        self.epoch = 0
        self.stats = LinkStats()
        self._socket = sock
        self._own, self._peer = own, peer
        self._handler = handler
        self._sending = threading.Lock()
        self._sequence = 0
        self._credit = WINDOW_BYTES
        self._released = 0
        self._heartbeat_s = heartbeat_s
        self.heard_s = time.monotonic()
        self._changed = threading.Condition()
        self._error: NetworkError | None = None
        self.has_left = False
        """Whether it was this end that said goodbye."""
        self._threads = [
            threading.Thread(target=work, name=f"vrm-{what}-{name}", daemon=True)
            for what, work in (("link", self._read), ("credit", self._tell_credit))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    # -- sending ----------------------------------------------------------------------------------------------------

    def send(
        self,
        opcode: Opcode,
        payload: Sequence[Buffer] = (),
        *,
        step: int = 0,
        layer: int = 0,
        dtype: str = "bytes",
        shape: tuple[int, ...] = (),
        flags: int = 0,
    ) -> None:
        """One frame; the payload's parts follow each other. Returns when the kernel has all of it, so the parts may
        change then. Waits for credit. Raises `LinkLostError`, and `ProtocolError` for what no frame may hold."""
        parts = [memoryview(part).cast("B") for part in payload if len(part)]
        nbytes = sum(map(len, parts))
        check_bound(opcode, nbytes)
        if opcode not in _FREE:
            self._take_credit(cost(nbytes))
        large = nbytes > PIECE_BYTES
        flags, summed = (flags | Flag.TRAILED, 0) if large else (flags | Flag.CHECKED, checksum(parts))
        try:
            with self._sending:
                header = Header(
                    opcode, flags, self.epoch, self._own, self._peer, step, layer, dtype, shape, self._sequence,
                    nbytes, summed,
                )  # fmt: skip
                self._sequence = (self._sequence + 1) & 0xFFFFFFFF
                if large:
                    _send_summed(self._socket, write_header(header), parts)
                else:
                    _send_all(self._socket, [write_header(header), *parts])
                self.stats.sent_frames += 1
                self.stats.sent_bytes += nbytes
        except OSError as error:
            raise self._lose(LinkLostError(f"{self.name}: {error.strerror or error}", node=self.name)) from error

    def release(self, header: Header) -> None:
        """A payload is done with: the other end may send as much again."""
        if header.opcode in _FREE:
            return
        with self._changed:
            self._released += cost(header.nbytes)
            if self._released >= _TELL_CREDIT_AT:
                self._changed.notify_all()

    def _tell_credit(self) -> None:
        while True:
            with self._changed:
                to_tell = self._changed.wait_for(
                    lambda: self._released >= _TELL_CREDIT_AT or self._error is not None, self._heartbeat_s
                )
                if self._error is not None:
                    return
                told = self._released if to_tell else 0
                self._released -= told
            with contextlib.suppress(LinkLostError):  # the handler hears of it
                self.send(Opcode.CREDIT if to_tell else Opcode.HEARTBEAT, step=told)

    def _take_credit(self, wanted: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._credit >= wanted or self._error is not None)
            if self._error is not None:
                raise self._error
            self._credit -= wanted

    # -- receiving --------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        head = memoryview(bytearray(HEADER_BYTES))
        expected = 0
        try:
            while True:
                _receive_all(self._socket, head)
                header = read_header(head)
                if header.sequence != expected:
                    raise ProtocolError(f"frame {header.sequence} instead of {expected}")
                expected = (expected + 1) & 0xFFFFFFFF
                self.heard_s = time.monotonic()
                self._take(header)
                self.heard_s = time.monotonic()
        except ProtocolError as error:
            self._lose(error, goodbye=error.message)
        except NetworkError as error:
            self._lose(error)
        except OSError as error:
            self._lose(LinkLostError(f"{self.name}: {error.strerror or error}", node=self.name))
        except Exception as error:  # whatever a handler raises ends the link, and is not lost with this thread
            logger.exception("a link's handler failed", link=self.name)
            self._lose(NetworkError(f"{self.name}: {error!r}"))

    def _take(self, header: Header) -> None:
        """Read a frame's payload, and hand it on."""
        if header.opcode in _OWN_BUSINESS:
            self._own_business(header)
        elif header.epoch != self.epoch:
            self._skip(header.nbytes + (TRAILER_BYTES if header.flags & Flag.TRAILED else 0))
            self.stats.stale += 1
            self.release(header)
        else:
            buffer = self._handler.buffer_for(header)
            if buffer is None:
                buffer = np.empty(header.nbytes, dtype=np.uint8).data
            payload = buffer[: header.nbytes]
            _receive_payload(self._socket, header, payload)
            self.stats.received_frames += 1
            self.stats.received_bytes += header.nbytes
            if self._handler.received(header, payload):
                self.release(header)

    def _own_business(self, header: Header) -> None:
        payload = memoryview(bytearray(header.nbytes))
        _receive_payload(self._socket, header, payload)
        if header.opcode is Opcode.CREDIT:
            with self._changed:
                self._credit += header.step
                if self._credit > WINDOW_BYTES:
                    raise ProtocolError("more credit than there is")
                self._changed.notify_all()
        elif header.opcode is Opcode.BYE:
            raise LinkLostError(f"{self.name}: {bytes(payload).decode(errors='replace') or 'it left'}", node=self.name)

    def _skip(self, nbytes: int) -> None:
        scratch = memoryview(bytearray(min(nbytes, 1 << 16)))
        while nbytes:
            part = scratch[: min(nbytes, len(scratch))]
            _receive_all(self._socket, part)
            nbytes -= len(part)

    # -- the end ----------------------------------------------------------------------------------------------------

    @property
    def error(self) -> NetworkError | None:
        """Why the link has ended, None while it has not."""
        return self._error

    def close(self, reason: str = "") -> None:
        """Say goodbye and end; whatever waits to send gets `LinkLostError`. Any thread but the link's own may wait for
        it."""
        self._lose(LinkLostError(f"{self.name}: {reason or 'closed'}", node=self.name), goodbye=reason)
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join()
        with self._sending:  # another thread may be saying goodbye
            self._socket.close()

    def abort(self, reason: str, *, goodbye: bool = False) -> None:
        """End without waiting for threads, in any thread; `close` it all the same. `goodbye`: tell the other end, which
        takes a moment where it is stuck."""
        self._lose(LinkLostError(f"{self.name}: {reason}", node=self.name), goodbye=reason if goodbye else None)

    def _say_goodbye(self, reason: str) -> None:
        """If the connection takes it at once: an end that is stuck is left without."""
        if not self._sending.acquire(timeout=_GOODBYE_S):
            return
        try:
            if self._socket.fileno() < 0:
                return
            text = reason.encode()[:1024]
            header = Header(
                Opcode.BYE, Flag.CHECKED, self.epoch, self._own, self._peer, sequence=self._sequence, nbytes=len(text),
                checksum=checksum((text,)),
            )  # fmt: skip
            self._socket.settimeout(_GOODBYE_S)
            with contextlib.suppress(OSError):
                self._socket.sendall(write_header(header) + text)
        finally:
            self._sending.release()

    def _lose(self, error: NetworkError, goodbye: str | None = None) -> NetworkError:
        """End the link with this error, unless it has ended before; returns the error that it ended with. `goodbye` is
        what the other end is told first: its own end, which follows at once, is not what ended this one."""
        with self._changed:
            first = self._error is None
            self._error = self._error or error
            self.has_left = self.has_left or (first and goodbye is not None)
            self._changed.notify_all()
        if first:
            if goodbye is not None:
                self._say_goodbye(goodbye)
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._handler.lost(error)
        assert self._error is not None
        return self._error


def _send_all(sock: socket.socket, parts: list[Buffer]) -> None:
    """All bytes of all parts, in as few calls as the kernel needs."""
    if not hasattr(sock, "sendmsg"):  # Windows
        for part in parts:
            sock.sendall(part)
        return
    views = [memoryview(part) for part in parts]
    while views:
        sent = sock.sendmsg(views)
        while views and sent >= len(views[0]):
            sent -= len(views.pop(0))
        if sent:
            views[0] = views[0][sent:]


def _send_summed(sock: socket.socket, head: bytes, parts: list[memoryview]) -> None:
    """A large payload piece by piece, its checksum behind it: the other end reads a piece while the next is summed."""
    total = Sum()
    first: list[Buffer] = [head]
    for part in parts:
        for offset in range(0, len(part), PIECE_BYTES):
            piece = part[offset : offset + PIECE_BYTES]
            total.add(piece)
            _send_all(sock, [*first, piece])
            first = []
    _send_all(sock, [total.trailer()])


def _receive_payload(sock: socket.socket, header: Header, payload: memoryview) -> None:
    """All of it, checked. Raises `ProtocolError` if it is not what was sent, and what `_receive_all` does."""
    if not header.flags & Flag.TRAILED:
        _receive_all(sock, payload)
        check_payload(header, payload)
        return
    total = Sum()
    for offset in range(0, len(payload), PIECE_BYTES):
        piece = payload[offset : offset + PIECE_BYTES]
        _receive_all(sock, piece)
        total.add(piece)
    trailer = memoryview(bytearray(TRAILER_BYTES))
    _receive_all(sock, trailer)
    if trailer != total.trailer():
        raise ProtocolError(f"{header.opcode.name}: the payload's checksum is wrong")


def _receive_all(sock: socket.socket, view: memoryview) -> None:
    """Fill the view. Raises `LinkLostError` if the other end closes before."""
    while view:
        received = sock.recv_into(view, 0, _WAIT_ALL)
        if not received:
            raise LinkLostError("the other end has closed the connection")
        view = view[received:]


_WAIT_ALL = getattr(socket, "MSG_WAITALL", 0)
