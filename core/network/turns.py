"""Who reads a link: its own thread, or whoever waits for what comes over it.

To wake a thread takes longer than a small frame takes on its way. So who waits for an answer reads the link meanwhile,
and the answer wakes one thread instead of two. The link's own thread stands back while it is so, and for a moment
afterwards: whoever waited once often does so again at once. While several wait it reads, as it does while nobody waits.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator

from core.network.connection import Connection
from core.network.sockets import Source

_STANDS_BACK_S = 1e-3
"""That nobody reads after somebody has waited, unless somebody else does."""
_LOOKS_EVERY_S = 16e-3
"""That the link's own thread sleeps at most while somebody else reads. It is not woken when that one has finished: that
would cost what was saved."""
_LOOKS_S = 200e-6
"""That whoever reads looks for the next frame before it sleeps, where the one before came as soon. So do kernels on
virtual machines (halt polling), and for the same reason: to be woken takes longer than what is waited for."""
_TAKEN_S = 50e-6
"""Between two looks, unless another thread had the core meanwhile."""
_SKIPS = 64
"""Frames before it looks again, once nothing had come by then or the core was wanted: by the other end, perhaps."""
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Turn:
    """Of one link. `Link.wait_for` borrows it; the link's own thread asks for it before each frame."""

    def __init__(self, sock: Connection, source: Source) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # whose own methods take a while
        self._waiting = 0
        self._borrower: int | None = None
        self._left_s = 0.0
        self._is_read = False  # by the link's own thread
        self._over = False
        self._ears, self._mouth = socket.socketpair()
        self._ears.setblocking(False)
        self._mouth.setblocking(False)
        self._looks = False
        self._skips = 0
        self._wait = _waiter(sock.fileno(), self._ears.fileno())

    # -- the link's own thread --------------------------------------------------------------------------------------

    def own(self) -> None:
        """Returns when a frame can be read, and nobody else reads."""
        while True:
            if self._borrower is not None or not self._is_read:
                self._stand_back()
            if self.comes():
                return

    def _stand_back(self) -> None:
        sleep_s = _STANDS_BACK_S
        with self._changed:
            self._is_read = False
            self._changed.notify_all()
            while self._borrower is not None or (
                not self._waiting and not self._over and time.monotonic() < self._left_s + _STANDS_BACK_S
            ):
                self._changed.wait(sleep_s)
                sleep_s = min(2 * sleep_s, _LOOKS_EVERY_S)
            self._is_read = True

    def done(self) -> None:
        """It reads no more."""
        with self._changed:
            self._is_read = False
            self._changed.notify_all()

    # -- whoever waits ----------------------------------------------------------------------------------------------

    def borrow(self, is_over: Callable[[], bool], until_s: float | None) -> bool:
        """Whether the caller may read, which has to end with `give_back`. Not while others wait, too, or if what it
        waits for (`is_over`) happens, or `until_s` (of `time.monotonic`) comes, before the link's own thread has stood
        back."""
        with self._lock:
            self._waiting += 1
            if self._waiting > 1 or self._over:
                return False
            self._borrower = threading.get_ident()
            if not self._has_stood_back():
                self._say()
                left_s = None if until_s is None else max(0.0, until_s - time.monotonic())
                self._changed.wait_for(lambda: self._has_stood_back() or is_over(), left_s)
                if not self._has_stood_back():
                    self._borrower = None
            return self._borrower is not None

    def _has_stood_back(self) -> bool:
        return not self._is_read

    @contextlib.contextmanager
    def read_by_its_own(self) -> Iterator[None]:
        """Whoever waits for what comes without reading himself: nobody stands back meanwhile who could read."""
        with self._lock:
            self._waiting += 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._lock:
                self._waiting -= 1

    def give_back(self) -> None:
        """Whoever waited does so no more, whether it might read or not."""
        with self._lock:
            self._waiting -= 1
            if self._borrower == threading.get_ident():
                self._borrower = None
                self._left_s = time.monotonic()
            if self._waiting or self._over:
                self._changed.notify_all()

    def comes(self, until_s: float | None = None) -> bool:
        """Whoever reads: wait until a frame begins to come. False: `until_s` came first, or somebody has called
        `wake`."""
        if self._source.has_bytes():
            return True
        found = self._look() if self._looks else None
        if found is None:
            began_s = time.perf_counter()
            found = self._wait(None if until_s is None else max(0.0, until_s - time.monotonic()))
            self._slept(time.perf_counter() - began_s)
        called, there = found
        if called:
            with contextlib.suppress(BlockingIOError):
                self._ears.recv(64)
        return there and not called

    def _look(self) -> tuple[bool, bool] | None:
        """For a moment, without sleeping; None if nothing has come."""
        began_s = before_s = time.perf_counter()
        while True:
            called, there = self._wait(0)
            if called or there:
                return called, there
            now_s = time.perf_counter()
            if now_s - began_s > _LOOKS_S or now_s - before_s > _TAKEN_S:
                self._skips, self._looks = _SKIPS, False
                return None
            before_s = now_s

    def _slept(self, seconds: float) -> None:
        """For what came next: whether to look before sleeping the next time."""
        if self._skips:
            self._skips -= 1
        else:
            self._looks = seconds < _LOOKS_S and _CORES > 1

    # -- any thread -------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Whoever waits shall look again whether it still does."""
        with self._lock:
            if self._borrower is not None:
                self._say()
                self._changed.notify_all()

    def _say(self) -> None:
        with contextlib.suppress(OSError):  # it is full, or closed: then it has been heard, or nobody listens
            self._mouth.send(b"!")

    def end(self) -> None:
        """The link has ended: nobody stands back any more."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def close(self) -> None:
        """Once it has ended. Waits until nobody reads, unless that is the caller."""
        with self._changed:
            self._changed.wait_for(lambda: self._borrower in (None, threading.get_ident()))
        self._ears.close()
        self._mouth.close()


def _waiter(link: int, ears: int) -> Callable[[float | None], tuple[bool, bool]]:
    """Waits for two sockets, for so many seconds or for ever (None), or looks (0). Whether something is there for
    `ears`, and for the link, its end included."""
    if not hasattr(select, "poll"):  # Windows

        def wait_by_select(timeout: float | None) -> tuple[bool, bool]:
            ready, _, _ = select.select([link, ears], [], [], timeout)
            return ears in ready, link in ready

        return wait_by_select
    poll = select.poll()
    poll.register(link, select.POLLIN)
    poll.register(ears, select.POLLIN)

    def wait(timeout: float | None) -> tuple[bool, bool]:
        ready = poll.poll(timeout if not timeout else math.ceil(1000 * timeout))
        if not ready:
            return False, False
        if len(ready) == 1:
            found = ready[0][0] == ears
            return found, not found
        return True, True

    return wait
