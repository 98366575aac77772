"""`Link`: frames to and from one other node over one connection.

Whoever sends writes to the socket in its own thread, header and payload in one call and without copying. One thread
reads, each payload straight into the buffer that the handler names for it. Payloads count against credit: a sender may
have `WINDOW_BYTES` at the other end that have not been released there, and then waits. So nothing queues without bound,
and a receiver with two buffers takes in the second payload while it works on the first.

A handler is called in the thread that reads: the link's own, or one that waits for what comes over it (`turns.py`). It
may compute there, and send on other links. On its own it may only answer, which needs no credit, and only if the other
end's reading thread never waits: two that both waited for room to write would wait for each other. So another thread
tells of credit.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable

import numpy as np
import structlog

from core.errors import LinkLostError, NetworkError, ProtocolError
from core.network.connection import Connection
from core.network.flow import FREE, OWN_BUSINESS, RDMA_BUSINESS, TELL_CREDIT_AT, WINDOW_BYTES, LinkHandler, cost
from core.network.frames import TRAILER_BYTES, Flag, Header, Opcode, read_header
from core.network.nixl_agent import Agent
from core.network.rdma import RemoteMemory, no_agent
from core.network.sending import Sender
from core.network.sockets import Source, receive_payload
from core.network.turns import Turn

logger = structlog.get_logger(__name__)

_GOODBYE_S = 1.0
_TRAILED, _IN_MEMORY, _ELSEWHERE = int(Flag.TRAILED), int(Flag.SHARED), int(Flag.ELSEWHERE)  # see `sending.py`
_OTHER_WAYS = int(Flag.SHARED | Flag.REMOTE | Flag.ELSEWHERE)
_ASKS, _ANSWERS = 0, 1
"""A heartbeat's `layer`. One that asks has the sender's clock as its step; one that answers has the same step."""


class Link(Sender):
    """One connection after the handshake; `start` begins to read. `own` and `peer` are the nodes' numbers.

    With `heartbeat_s` the other end hears of this one so often, whatever else there is to say. `heard_s` is when the
    other end was heard of, by `time.monotonic()`; `round_trip_s` what the last heartbeat took there and back, threads
    that had to wake included. `observe` hears of each of these as "round_trip", and of how long a tensor took to be
    sent, what it waited for credit included, as "send". `new_agent` is for `ask_for_rdma`.
    """

    def __init__(
        self, sock: Connection, own: int, peer: int, handler: LinkHandler, *, name: str,
        heartbeat_s: float | None = None, observe: Callable[[str, float], None] | None = None,
        new_agent: Callable[[], Agent] = no_agent,
    ) -> None:  # fmt: skip
        sock.settimeout(None)
        with contextlib.suppress(OSError):  # not every kind of socket has it
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        remote = RemoteMemory(name, new_agent, self.send, self._answer, lambda: self._error is not None)
        super().__init__(sock, own, peer, name, remote, observe)
        self._source = Source(sock)
        self._turn = Turn(sock, self._source)
        self._expected = 0
        self._handler = handler
        self.elsewhere: Callable[[Header, bool], None] | None = None
        """Brings the payload of a frame that came without it, or drops it. Called as handlers are."""
        self._credit = WINDOW_BYTES
        self._released = 0
        self._heartbeat_s = heartbeat_s
        self._asked_ns = 0
        self._answers: dict[Opcode, tuple[int, int]] = {}
        self.heard_s = time.monotonic()
        self.round_trip_s: float | None = None
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # whose own methods take a while
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

    def ask_for_rdma(self, timeout_s: float = 0.0) -> bool:
        """Find out whether large payloads go by RDMA from here, and wait so long for it. Whether they do so then."""
        return self._remote.ask(timeout_s)

    # -- credit, and signs of life ----------------------------------------------------------------------------------

    def release(self, header: Header) -> None:
        """A payload is done with: the other end may send as much again."""
        if header.opcode in FREE:
            return
        with self._lock:
            self._released += cost(header.nbytes)
            if self._released >= TELL_CREDIT_AT:
                self._changed.notify_all()

    def _tell_credit(self) -> None:
        """And give signs of life, and answer the other end's."""
        beat_s = time.monotonic() + (self._heartbeat_s or 0.0)
        while True:
            with self._changed:
                left_s = max(0.0, beat_s - time.monotonic()) if self._heartbeat_s is not None else None
                self._changed.wait_for(self._has_to_tell, left_s)
                if self._error is not None:
                    return
                told = self._released if self._released >= TELL_CREDIT_AT else 0
                self._released -= told
                answers, self._answers = self._answers, {}
            with contextlib.suppress(LinkLostError):  # the handler hears of it
                if told:
                    self.send(Opcode.CREDIT, step=told)
                for opcode, (step, layer) in answers.items():
                    self.send(opcode, step=step, layer=layer)
                if self._heartbeat_s is not None and time.monotonic() >= beat_s:
                    beat_s = time.monotonic() + self._heartbeat_s
                    self._asked_ns = time.monotonic_ns()
                    self.send(Opcode.HEARTBEAT, step=self._asked_ns, layer=_ASKS)

    def _has_to_tell(self) -> bool:
        return self._released >= TELL_CREDIT_AT or bool(self._answers) or self._error is not None

    def _take_credit(self, wanted: int) -> None:
        with self._lock:
            if self._credit < wanted:
                with self._turn.read_by_its_own():
                    self._changed.wait_for(lambda: self._credit >= wanted or self._error is not None)
            if self._error is not None:
                raise self._error
            self._credit -= wanted

    # -- receiving --------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            while self._error is None:
                self._turn.own()
                self._read_frame()
        finally:
            self._turn.done()

    def wait_for(
        self, is_over: Callable[[], bool], changed: threading.Condition, timeout_s: float | None = None
    ) -> bool:
        """Until something has come over the link, or the link has ended and its handler knows: until `is_over`, which
        is asked while `changed` is held, and which whoever makes it true tells by `changed`. Who does so without the
        link calls `wake`, too. Whether it is over by then. The calling thread may read the link meanwhile, so not in
        one of the link's own threads, and not while it holds what a handler needs."""

        def look() -> bool:
            with changed:
                return is_over()

        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        turn = self._turn
        try:
            if turn.borrow(look, until_s):
                while not look() and self._error is None and (until_s is None or time.monotonic() < until_s):
                    if turn.comes(until_s):
                        self._read_frame()
            with changed:
                return changed.wait_for(is_over, None if until_s is None else until_s - time.monotonic())
        finally:
            turn.give_back()

    def wake(self) -> None:
        """What somebody waits for may have come another way: see `wait_for`."""
        self._turn.wake()

    def _read_frame(self) -> None:
        """One, by whoever's turn it is. Whatever is wrong with it ends the link."""
        try:
            header = read_header(self._source.head())
            if header.sequence != self._expected:
                raise ProtocolError(f"frame {header.sequence} instead of {self._expected}")
            self._expected = (self._expected + 1) & 0xFFFFFFFF
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
        if header.opcode in OWN_BUSINESS:
            self._own_business(header)
        elif header.epoch != self.epoch:
            self._skip(header)
            self.stats.stale += 1
            self.release(header)
        elif header.flags & _ELSEWHERE:
            self._announced(header, keep=True)
            self.stats.received(header, rdma=False)
            if self._handler.received(header, memoryview(b"")):
                self.release(header)
        else:
            buffer = self._handler.buffer_for(header)
            if buffer is None:
                buffer = np.empty(header.nbytes, dtype=np.uint8).data
            payload = buffer[: header.nbytes]
            self._receive(header, payload)
            self.stats.received(header, rdma=bool(header.flags & Flag.REMOTE))
            if self._handler.received(header, payload):
                self.release(header)

    def _announced(self, header: Header, *, keep: bool) -> None:
        if self.elsewhere is None:
            raise ProtocolError(f"{header.opcode.name} without its payload, which comes no other way here")
        self.elsewhere(header, keep)

    def _receive(self, header: Header, payload: memoryview) -> None:
        """A payload, whichever way it comes."""
        if not header.flags & _OTHER_WAYS:
            receive_payload(self._source, header, payload)
        elif header.flags & _IN_MEMORY:
            self._memory.receive(self._source, header.nbytes, payload)
        else:
            self._remote.receive(self._source, header, payload)

    def _own_business(self, header: Header) -> None:
        if header.flags & _OTHER_WAYS and header.opcode is not Opcode.PROBE:
            raise ProtocolError(f"{header.opcode.name} does not travel in shared memory")
        payload = memoryview(bytearray(header.nbytes))
        self._receive(header, payload)
        if header.opcode in RDMA_BUSINESS:
            self._remote.heard(header, payload)
        elif header.opcode is Opcode.CREDIT:
            with self._changed:
                self._credit += header.step
                if self._credit > WINDOW_BYTES:
                    raise ProtocolError("more credit than there is")
                self._changed.notify_all()
        elif header.opcode is Opcode.HEARTBEAT:
            self._sign_of_life(header)
        elif header.opcode is Opcode.SHARE:
            self._answer(Opcode.SHARED, int(self._memory.open(bytes(payload))))
        elif header.opcode is Opcode.SHARED:
            self._memory.answered(header.step == 1)
        elif header.opcode is Opcode.BYE:
            raise LinkLostError(f"{self.name}: {bytes(payload).decode(errors='replace') or 'it left'}", node=self.name)

    def _sign_of_life(self, header: Header) -> None:
        self.stats.received_signs += 1
        if header.layer == _ASKS:
            self._answer(Opcode.HEARTBEAT, header.step, _ANSWERS)
        elif header.step == self._asked_ns:
            self.round_trip_s = (time.monotonic_ns() - self._asked_ns) / 1e9
            if self._observe is not None:
                self._observe("round_trip", self.round_trip_s)

    def _answer(self, opcode: Opcode, step: int, layer: int = 0) -> None:
        """By the thread that may wait for room to write; of each kind, the last one."""
        with self._changed:
            self._answers[opcode] = step, layer
            self._changed.notify_all()

    def _skip(self, header: Header) -> None:
        if header.flags & _IN_MEMORY:
            self._memory.receive(self._source, header.nbytes, None)
        elif header.flags & Flag.REMOTE:
            self._remote.receive(self._source, header, None)
        elif header.flags & _ELSEWHERE:
            self._announced(header, keep=False)
        else:
            self._source.skip(header.nbytes + (TRAILER_BYTES if header.flags & _TRAILED else 0))

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
        self._remote.join()
        self._turn.close()
        with self._sending:  # another thread may be saying goodbye
            self._socket.close()
            self._memory.close()
            self._remote.close()

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
            self._socket.settimeout(_GOODBYE_S)
            with contextlib.suppress(OSError):
                self._write_own(Opcode.BYE, text)
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
            self._turn.end()
            self._remote.end()
            if goodbye is not None:
                self._say_goodbye(goodbye)
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._handler.lost(error)
        assert self._error is not None
        return self._error
