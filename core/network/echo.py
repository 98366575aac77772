"""How fast a link is: one end sends, the other sends it back."""

from __future__ import annotations

import statistics
import threading
import time
from typing import NamedTuple

from core.errors import LinkLostError, NetworkError
from core.network.frames import MIB, Header, Opcode
from core.network.link import Link

_SMALL_BYTES = 64
_SMALL_TIMES = 15
_LARGEST_BYTES = 16 * MIB
_ENOUGH_S = 0.03
"""Payloads grow until one takes so long there and back: what is sent less often says more about latency than rate."""
_LARGE_TIMES = 3
_PATIENCE_S = 30.0


class LinkSpeed(NamedTuple):
    """Seconds for a small frame one way, its handling by threads included, and payload bytes per second."""

    latency_s: float
    bandwidth_bytes_s: float


class Echo:
    """Of one end of a link. `attach` it before the link starts."""

    def __init__(self) -> None:
        self._link: Link | None = None
        self._back: set[int] = set()
        self._changed = threading.Condition()
        self._number = 0
        self._error: NetworkError | None = None

    def attach(self, link: Link) -> None:
        self._link = link

    @staticmethod
    def takes(header: Header) -> bool:
        """Whether a frame is one of a measurement."""
        return header.opcode in (Opcode.ECHO, Opcode.ECHOED)

    def take(self, header: Header, payload: memoryview) -> None:
        """In the link's thread: send it back, or note that it is back."""
        if header.opcode is Opcode.ECHO:
            assert self._link is not None
            self._link.send(Opcode.ECHOED, [payload], step=header.step)
            return
        with self._changed:
            if header.step == self._number:  # else nobody waits for it any more
                self._back.add(header.step)
            self._changed.notify_all()

    def lose(self, error: NetworkError) -> None:
        """The link has ended."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def measure(self) -> LinkSpeed:
        """Takes a fraction of a second on a fast link, some seconds on a slow one. Raises `LinkLostError`."""
        small_s = statistics.median(self._there_and_back(_SMALL_BYTES) for _ in range(_SMALL_TIMES)) / 2
        nbytes = MIB // 16
        while (took_s := self._there_and_back(nbytes)) < _ENOUGH_S and nbytes < _LARGEST_BYTES:
            nbytes *= 2
        large_s = min([took_s, *(self._there_and_back(nbytes) for _ in range(_LARGE_TIMES - 1))]) / 2
        further = nbytes - _SMALL_BYTES
        return LinkSpeed(small_s, further / (large_s - small_s) if large_s > small_s else nbytes / large_s)

    def _there_and_back(self, nbytes: int) -> float:
        assert self._link is not None
        self._number = number = self._number + 1
        began_s = time.perf_counter()
        self._link.send(Opcode.ECHO, [bytes(nbytes)], step=number)
        came = self._link.wait_for(lambda: number in self._back or self._error is not None, self._changed, _PATIENCE_S)
        with self._changed:
            if self._error is not None:
                raise self._error
            if not came:
                raise LinkLostError(f"{self._link.name}: {nbytes} bytes did not come back within {_PATIENCE_S:g} s")
            self._back.discard(number)
        return time.perf_counter() - began_s
