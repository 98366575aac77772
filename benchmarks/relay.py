"""A relay between two ends of TCP connections that can be cut, or swallow everything, as cables and switches do."""

from __future__ import annotations

import contextlib
import socket
import threading


class Relay:
    """Listens on loopback, and passes each connection on to `target`."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._server = socket.create_server(("127.0.0.1", 0))
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self._passing = threading.Event()
        self._passing.set()
        self._down = False
        threading.Thread(target=self._accept, name="relay", daemon=True).start()

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._server.getsockname()
        return host, port

    def cut(self) -> None:
        """Both ends hear at once that the connections are gone; new ones are not taken."""
        with self._lock:
            self._down = True
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for sock in pair:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def swallow(self) -> None:
        """Nobody hears anything any more, and nobody hears that."""
        self._passing.clear()

    def restore(self) -> None:
        """As before, without the connections that there were."""
        self.cut()
        self._passing.set()
        with self._lock:
            self._down = False

    def close(self) -> None:
        self.restore()
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            with self._lock:
                down = self._down
            if down or not self._passing.is_set():
                near.close()
                continue
            far = socket.create_connection(self._target)
            for sock in (near, far):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._pairs.append((near, far))
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=(source, target), name="relay", daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        buffer = memoryview(bytearray(1 << 18))
        try:
            while count := source.recv_into(buffer):
                self._passing.wait()
                target.sendall(buffer[:count])
        except OSError:
            pass
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
