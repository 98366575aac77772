"""The sending half of a link: frames into a connection, each payload by the way that is best for it."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from core.errors import LinkLostError, NetworkError
from core.network.connection import Connection
from core.network.flow import FREE, cost
from core.network.frames import SUMMED_AHEAD_BYTES, Buffer, Flag, Opcode, check_bound, checksum, pack_header
from core.network.rdma import RemoteMemory
from core.network.shared_memory import SharedMemory
from core.network.sockets import send_all, send_summed
from core.network.traffic import LinkStats

_CHECKED, _TRAILED, _IN_MEMORY = int(Flag.CHECKED), int(Flag.TRAILED), int(Flag.SHARED)  # an enum's `&` takes a while
_LARGE = _TRAILED | _IN_MEMORY
_REMOTE = int(Flag.REMOTE | Flag.CHECKED)
_ELSEWHERE = int(Flag.ELSEWHERE)


class Sender(ABC):
    """See `Link`, which has the rest: credit, and what becomes of a connection that breaks."""

    def __init__(
        self, sock: Connection, own: int, peer: int, name: str, remote: RemoteMemory,
        observe: Callable[[str, float], None] | None,
    ) -> None:  # fmt: skip
        self.name = name
        self.epoch = 0
        self.stats = LinkStats()
        self._socket = sock
        self._memory = SharedMemory(sock)
        self._remote = remote
        self._own, self._peer = own, peer
        self._observe = observe
        self._sending = threading.Lock()
        self._sequence = 0

    @abstractmethod
    def _take_credit(self, wanted: int) -> None:
        """Wait for it. Raises what the link ended with."""

    @abstractmethod
    def _lose(self, error: NetworkError, goodbye: str | None = None) -> NetworkError:
        """End the link; returns what it ended with."""

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
        began_s = time.perf_counter()
        if opcode not in FREE:
            self._take_credit(cost(nbytes))
        large = nbytes > SUMMED_AHEAD_BYTES
        flags, summed = (int(flags), 0) if large else (flags | _CHECKED, checksum(parts))
        try:
            with self._sending:
                remote = None
                if large and (offer := self._memory.offer(nbytes)) is not None:
                    self._write_own(Opcode.SHARE, offer)
                if large and self._remote.takes(nbytes) and (remote := self._remote.put(parts)) is not None:
                    flags, summed, parts = flags | _REMOTE, checksum(parts), [memoryview(remote)]
                elif large:
                    flags |= _IN_MEMORY if self._memory.takes(nbytes) else _TRAILED
                self._write(opcode, flags, step, layer, dtype, shape, nbytes, summed, parts)
                self.stats.sent(opcode, nbytes, tensor=dtype != "bytes", rdma=remote is not None)
        except OSError as error:
            raise self._lose(LinkLostError(f"{self.name}: {error.strerror or error}", node=self.name)) from error
        if self._observe is not None and dtype != "bytes":
            self._observe("send", time.perf_counter() - began_s)

    def announce(
        self, opcode: Opcode, nbytes: int, *, step: int, layer: int, dtype: str, shape: tuple[int, ...]
    ) -> None:
        """A frame whose payload goes another way, once this has returned. Waits and raises as `send` does."""
        check_bound(opcode, nbytes)
        if opcode not in FREE:
            self._take_credit(cost(nbytes))
        try:
            with self._sending:
                self._write(opcode, _ELSEWHERE, step, layer, dtype, shape, nbytes, 0, [])
                self.stats.sent(opcode, nbytes, tensor=True, rdma=False)
        except OSError as error:
            raise self._lose(LinkLostError(f"{self.name}: {error.strerror or error}", node=self.name)) from error

    def _write_own(self, opcode: Opcode, data: bytes) -> None:
        """A frame of the link's own business, by whoever may send now."""
        self._write(opcode, _CHECKED, 0, 0, "bytes", (), len(data), checksum((data,)), [memoryview(data)])

    def _write(
        self, opcode: Opcode, flags: int, step: int, layer: int, dtype: str, shape: tuple[int, ...], nbytes: int,
        summed: int, parts: Sequence[memoryview],
    ) -> None:  # fmt: skip
        """A frame, by whoever may send now."""
        head = pack_header(
            opcode, flags, self.epoch, self._own, self._peer, step, layer, dtype, shape, self._sequence, nbytes, summed
        )
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        if not flags & _LARGE:
            send_all(self._socket, [head, *parts])
        elif flags & _IN_MEMORY:
            self._memory.send(self._socket, head, parts)
        else:
            send_summed(self._socket, head, parts)
