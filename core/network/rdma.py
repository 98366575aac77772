"""Large payloads to another host past both kernels: the sender's network card writes them into the receiver's memory.

Each direction has a region of its own, which the receiver registers with its card when the sender asks (`REACH`) and
describes in its answer (`REGION`), over the connection, which has proved who is there. The sender has a region of the
same size: a payload is copied there, written from there piece by piece while the next piece is copied, and only once it
is there as a whole its header follows over the connection. So the order of frames and the end of a link are what they
are without it, and a write that fails costs nothing but time: the payload goes over the connection, as do all others.

The sender first times both ways with the same probes, and uses this one only where it is quicker. A payload's checksum
is in its header, as that of a small one: a card's own checksums say nothing of what the two machines make of it.

What is written so is not encrypted, and whoever can read the connection learns how to write into a region. So there is
none of this on connections that encrypt, and none between processes of one host: they share memory.
"""

from __future__ import annotations

import queue
import struct
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import structlog

from core.errors import NetworkError, ProtocolError
from core.network.connection import Connection
from core.network.frames import MIB, Flag, Header, Opcode, check_payload, checksum
from core.network.nixl_agent import Agent, NixlAgent, is_installed, rdma_devices
from core.network.shared_memory import Bytes, may_be_on_one_host
from core.network.sockets import Source

logger = structlog.get_logger(__name__)

REGION_BYTES = 64 * MIB
LEAST_BYTES = 256 << 10
"""Of a payload that goes this way."""
_PIECE_BYTES = 2 * MIB
"""That are written while the next ones are copied."""
_PATIENCE_S = 5.0
"""That a payload may take to be written, or the other end to answer, before this way is given up."""
RDMA_ASKED_S = 20.0
"""That a link waits at its start for what comes out of it, before its speed is measured."""
_PROBE_BYTES = 4 * MIB
_PROBES = 4
_SLOW_S = 0.5
"""For a probe. A connection that needs so long is not timed again."""
_LOOKS_EVERY_S = 50e-6
_DAMAGED = (1 << 64) - 1
"""Instead of a probe's number: it did not arrive as it was sent."""
_DESCRIBED = struct.Struct("<QQ")
_OFFSET = struct.Struct("<Q")


class Says(Protocol):
    """`Link.send`."""

    def __call__(self, opcode: Opcode, payload: Sequence[bytes] = (), *, step: int = 0) -> None: ...


def no_agent() -> Agent:
    """Where there is nothing of this. Raises `OSError`."""
    raise OSError("there is no RDMA for this connection")


def agent_for(sock: Connection) -> Callable[[], Agent]:
    """What makes the agent for a connection, once it is needed; `no_agent` where there is none to make."""
    if hasattr(sock, "binding") or may_be_on_one_host(sock):  # one that encrypts, or that shared memory is for
        return no_agent
    devices = rdma_devices()
    return partial(NixlAgent, devices) if devices and is_installed() else no_agent


class _Outgoing:
    """The sender's end of a region at the other end."""

    def __init__(self, agent: Agent, answer: bytes) -> None:
        """Raises `OSError` if it cannot be written to, and `ProtocolError` if it is not what was agreed on."""
        self._address, nbytes = _DESCRIBED.unpack_from(answer)
        if nbytes != REGION_BYTES:
            raise ProtocolError(f"a region of {nbytes} bytes instead of {REGION_BYTES}")
        self._agent, self._other = agent, agent.meet(answer[_DESCRIBED.size :])
        self._own: Bytes = np.zeros(REGION_BYTES, dtype=np.uint8)
        agent.register(self._own)
        self._sent = 0
        self.taken = 0

    def has_room(self, nbytes: int) -> bool:
        return 0 <= self._sent - self.taken <= REGION_BYTES - nbytes

    def put(self, parts: Sequence[memoryview], is_over: Callable[[], bool]) -> int:
        """Write a payload that there is room for; where in the region it begins. Raises `OSError` if it does not get
        there in time."""
        begin, until_s = self._sent % REGION_BYTES, time.monotonic() + _PATIENCE_S
        under_way: list[Callable[[], bool]] = []
        for part in parts:
            data = np.frombuffer(part, dtype=np.uint8)
            done = 0
            while done < len(data):
                at = self._sent % REGION_BYTES
                piece = data[done : done + min(_PIECE_BYTES, REGION_BYTES - at)]
                np.copyto(self._own[at : at + len(piece)], piece)
                under_way.append(
                    self._agent.write(self._own.ctypes.data + at, len(piece), self._other, self._address + at)
                )
                self._sent += len(piece)
                done += len(piece)
        while under_way := [is_there for is_there in under_way if not is_there()]:
            if is_over() or time.monotonic() > until_s:
                raise OSError(f"a payload was not written within {_PATIENCE_S:g} s")
            time.sleep(_LOOKS_EVERY_S)
        return begin


class _Incoming:
    """The receiver's end."""

    def __init__(self, agent: Agent) -> None:
        """Raises `OSError`."""
        self._region: Bytes = np.zeros(REGION_BYTES, dtype=np.uint8)
        agent.register(self._region)
        self.answer = _DESCRIBED.pack(self._region.ctypes.data, REGION_BYTES) + agent.metadata()
        self.taken = 0

    def take(self, offset: int, nbytes: int, payload: memoryview | None) -> None:
        """A payload out of it; None: it is dropped. Raises `ProtocolError`."""
        if offset >= REGION_BYTES or nbytes > REGION_BYTES:
            raise ProtocolError(f"{nbytes} bytes from {offset} on are not within a region of {REGION_BYTES}")
        if payload is not None:
            into = np.frombuffer(payload, dtype=np.uint8)
            first = self._region[offset : offset + nbytes]
            np.copyto(into[: len(first)], first)
            np.copyto(into[len(first) :], self._region[: nbytes - len(first)])
        self.taken += nbytes


class RemoteMemory:
    """What a link needs of both directions' regions. `say` and `tell` are the link's, for frames of its own: the first
    waits, the second leaves it to another thread. One thread may send, and another one receive."""

    def __init__(
        self, name: str, new_agent: Callable[[], Agent], say: Says, tell: Callable[[Opcode, int], None],
        is_over: Callable[[], bool],
    ) -> None:  # fmt: skip
        self._name, self._new_agent, self._say, self._tell, self._is_over = name, new_agent, say, tell, is_over
        self._agent: Agent | None = None
        self._outgoing: _Outgoing | None = None
        self._incoming: _Incoming | None = None
        self._uses = False
        self._changed = threading.Condition()
        self._asked = self._was_asked = self._settled = self._closed = False
        self._answer: bytes | None = None
        self._number, self._probed = 0, 0
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"vrm-rdma-{name}", daemon=True)

    # -- the connection's threads -----------------------------------------------------------------------------------

    def ask(self, timeout_s: float = 0.0) -> bool:
        """Find out, once, whether payloads are to go this way, in another thread; wait so long for what comes out.
        Whether they do."""
        with self._changed:
            if not self._asked and not self._closed and self._new_agent is not no_agent:
                self._asked = True
                self._do(self._find_out)
            self._changed.wait_for(lambda: self._settled or self._closed or not self._asked, timeout_s)
        return self._uses

    def takes(self, nbytes: int) -> bool:
        """Whether a payload can go this way now."""
        outgoing = self._outgoing  # another thread may give it up
        return self._uses and nbytes >= LEAST_BYTES and outgoing is not None and outgoing.has_room(nbytes)

    def put(self, parts: Sequence[memoryview]) -> bytes | None:
        """Write a payload that is taken; what follows its header. None if it did not get there: it has to go another
        way, and so have all others."""
        outgoing = self._outgoing
        if outgoing is None:
            return None
        try:
            return _OFFSET.pack(outgoing.put(parts, self._is_over))
        except OSError as error:
            logger.warning("RDMA is not used any more", link=self._name, reason=str(error))
            self._uses, self._outgoing = False, None
            return None

    def receive(self, source: Source, header: Header, payload: memoryview | None) -> None:
        """A payload, after its header; None: it is dropped. Raises what `Source.fill` does, and `ProtocolError`."""
        told = memoryview(bytearray(_OFFSET.size))
        source.fill(told)
        if self._incoming is None:
            raise ProtocolError("a payload in memory that was not offered")
        (offset,) = _OFFSET.unpack(told)
        self._incoming.take(offset, header.nbytes, payload)
        self._tell(Opcode.TAKEN, self._incoming.taken)
        if payload is not None and header.opcode is not Opcode.PROBE:
            check_payload(header, payload)

    def heard(self, header: Header, payload: memoryview) -> None:
        """A frame of `RDMA_BUSINESS`. Raises `ProtocolError`."""
        with self._changed:
            if header.opcode is Opcode.REACH:
                if self._was_asked:
                    raise ProtocolError("a region is asked for a second time")
                self._was_asked = True
                self._do(self._open)
                if not self._asked and self._new_agent is not no_agent:
                    self._asked = True
                    self._do(self._find_out)
            elif header.opcode is Opcode.REGION:
                if not self._asked or self._answer is not None:
                    raise ProtocolError("a region is offered that nobody asked for")
                self._answer = bytes(payload)
            elif header.opcode is Opcode.TAKEN:
                if self._outgoing is not None:
                    self._outgoing.taken = header.step
            elif header.opcode is Opcode.PROBE:
                sound = not header.flags & Flag.CHECKED or checksum((payload,)) == header.checksum
                self._tell(Opcode.PROBED, header.step if sound else _DAMAGED)
            else:
                self._probed = header.step
            self._changed.notify_all()

    def end(self) -> None:
        """The link has ended: nobody is waited for any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def join(self) -> None:
        """The link has ended. Waits for the thread."""
        if self._thread.is_alive():
            self._work.put(None)
            self._thread.join()

    def close(self) -> None:
        """After `join`, once nobody sends or receives any more."""
        self._outgoing = self._incoming = None
        agent, self._agent = self._agent, None
        if agent is not None:
            try:
                agent.close()
            except OSError as error:
                logger.debug("RDMA did not end well", link=self._name, reason=str(error))

    # -- a thread of its own ----------------------------------------------------------------------------------------

    def _do(self, work: Callable[[], None]) -> None:
        self._work.put(work)
        if not self._thread.is_alive():
            self._thread.start()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                work()
            except (OSError, NetworkError) as error:
                logger.info("RDMA is not used", link=self._name, reason=str(error))

    def _ready(self) -> Agent:
        if self._agent is None:
            self._agent = self._new_agent()
        return self._agent

    def _open(self) -> None:
        """What the other end may write to; nothing, where this one cannot do it."""
        answer = b""
        try:
            incoming = _Incoming(self._ready())
            answer, self._incoming = incoming.answer, incoming
        finally:
            self._say(Opcode.REGION, [answer] if answer else [])

    def _find_out(self) -> None:
        uses = False
        try:
            agent = self._ready()
            self._say(Opcode.REACH)
            self._wait_for(lambda: self._answer is not None)
            if self._answer:
                self._outgoing = _Outgoing(agent, self._answer)
                tcp_s, rdma_s = self._time(by_rdma=False), self._time(by_rdma=True)
                uses = self._uses and rdma_s < tcp_s
                rates = {"rdma": f"{_PROBE_BYTES / rdma_s / 1e9:.2f}", "tcp": f"{_PROBE_BYTES / tcp_s / 1e9:.2f}"}
                logger.info("RDMA was timed", link=self._name, is_used=uses, unit="GB/s", **rates)
        finally:
            with self._changed:
                self._uses, self._settled = uses, True
                if not uses:
                    self._outgoing = None
                self._changed.notify_all()

    def _time(self, *, by_rdma: bool) -> float:
        """Seconds until the other end has a probe, at best. Raises `OSError`."""
        self._uses = by_rdma
        taken: list[float] = []
        for _ in range(_PROBES):
            number = self._number = self._number + 1
            data = number.to_bytes(8, "little") * (_PROBE_BYTES // 8)
            began_s = time.perf_counter()
            self._say(Opcode.PROBE, [data], step=number)
            self._wait_for(lambda: self._probed >= self._number)
            if self._probed == _DAMAGED:
                raise OSError("what was written did not arrive as it was")
            taken.append(time.perf_counter() - began_s)
            if taken[-1] > _SLOW_S:
                break
        return min(taken)

    def _wait_for(self, has_come: Callable[[], bool]) -> None:
        """Until the other end has answered. Raises `OSError`."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or has_come(), _PATIENCE_S)
            if not has_come():
                raise OSError("the other end does not answer")
