"""A connection that is encrypted, by TLS 1.3, with what a link needs of a socket.

OpenSSL does not allow two threads in one connection's state, and a link reads in one thread while others write. Whether
Python keeps them apart depends on its version (it has a lock for each object since 3.13; before, nothing), and an
`SSLSocket` that blocks inside of a read could not be locked from outside: whoever wants to write would wait until
something arrives. So here the state has no socket at all (`ssl.MemoryBIO`). It is locked while bytes are encrypted or
decrypted, a piece at a time, which never waits for the network; the socket is read and written outside of that lock.
Whoever writes has a second lock, for records have to travel in the order in which they were made. The thread that reads
never takes that one: it must not wait for a writer, who may be waiting for the other end to read.

What OpenSSL itself wants to say (an answer to a change of keys, an alert) travels before the next piece that is sent.
"""

from __future__ import annotations

import hashlib
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from typing import Any

from core.errors import ProtocolError
from core.network.certificates import Identity
from core.network.frames import Buffer

OPENING_BYTES = 5
"""A record's header, by which it is known: its kind, 3 and a minor version, the size of what follows."""
RECORD_BYTES = 1 << 14
"""Most that one record holds."""
_PIECE_BYTES = 4 * RECORD_BYTES
"""That is encrypted under the lock at once, and that is read at once: some 20 us of work, in which the others wait."""
_HANDSHAKE, _ALERT = 22, 21
_WAIT_ALL = getattr(socket, "MSG_WAITALL", 0)


def begins_tls(opening: Buffer) -> bool:
    """Whether this is how TLS begins, on either side."""
    return opening[0] in (_HANDSHAKE, _ALERT) and opening[1] == 3


def record_rest(opening: Buffer) -> int:
    """The bytes of a record that follow its header: the size that it names, as far as one may be so large."""
    return min(int.from_bytes(opening[3:5], "big"), RECORD_BYTES + 256)


class TlsEnd:
    """One end's state, without a socket. Any thread; nothing here waits for the network."""

    def __init__(self, identity: Identity, *, listens: bool) -> None:
        self._identity, self._listens = identity, listens
        context = identity.as_listener if listens else identity.as_caller
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._state = context.wrap_bio(self._incoming, self._outgoing, server_side=listens)
        self._lock = threading.Lock()
        self.is_open = False
        """Whether the handshake is over."""

    @property
    def binding(self) -> bytes:
        """The SHA-256 of the listener's certificate as this end sees it (`tls-server-end-point` of RFC 5929). The
        same at both ends, unless there is a third one between them."""
        assert self.is_open
        if self._listens:
            return self._identity.fingerprint
        certificate = self._state.getpeercert(binary_form=True)
        assert certificate is not None
        return hashlib.sha256(certificate).digest()

    def take(self, data: Buffer) -> None:
        """What has come from the network."""
        with self._lock:
            self._incoming.write(data)

    def to_say(self) -> bytes:
        """What has to go out by now."""
        with self._lock:
            return self._outgoing.read()

    def go_on(self) -> None:
        """With the handshake, as far as what was taken goes. Raises `ProtocolError`."""
        with self._lock:
            try:
                self._state.do_handshake()
            except ssl.SSLWantReadError:
                return
            except ssl.SSLError as error:
                raise ProtocolError(f"TLS: {_reason(error)}") from error
            self.is_open = True

    def seal(self, parts: Sequence[Buffer]) -> bytes:
        """The records of these bytes. Raises `ConnectionAbortedError`, as sockets do, if nothing more can be sent."""
        with self._lock:
            try:
                for part in parts:
                    self._state.write(part)
            except ssl.SSLError as error:
                raise ConnectionAbortedError(f"TLS: {_reason(error)}") from error
            return self._outgoing.read()

    def has_bytes(self) -> bool:
        """Whether something has been taken that is not opened yet, be it half a record."""
        with self._lock:
            return bool(self._incoming.pending or self._state.pending())

    def open_into(self, view: memoryview) -> int | None:
        """Decrypt into the view what is there, of one record at most; how many bytes that were. 0: the other end has
        ended it. None: more has to be taken first. Raises `ProtocolError` for what the other end did not send."""
        with self._lock:
            if not self._incoming.pending and not self._state.pending():
                return None
            try:
                return self._state.read(len(view), view)  # type: ignore[return-value]
            except ssl.SSLWantReadError:
                return None
            except ssl.SSLZeroReturnError:
                return 0
            except ssl.SSLError as error:
                raise ProtocolError(f"TLS: {_reason(error)}") from error


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).lower().replace("_", " ")


class TlsConnection:
    """A socket and the state of its encryption, once the handshake is over: a `Connection`."""

    def __init__(self, sock: socket.socket, end: TlsEnd) -> None:
        self._socket, self._end = sock, end
        self._writing = threading.Lock()
        self._scratch = memoryview(bytearray(_PIECE_BYTES))
        self.binding = end.binding
        """See `TlsEnd.binding`."""
        self.has_bytes = end.has_bytes
        self.settimeout, self.setsockopt = sock.settimeout, sock.setsockopt
        self.fileno, self.shutdown, self.close = sock.fileno, sock.shutdown, sock.close

    @property
    def family(self) -> int:
        return self._socket.family

    def getsockname(self) -> Any:
        return self._socket.getsockname()

    def getpeername(self) -> Any:
        return self._socket.getpeername()

    def sendall(self, data: Buffer, /) -> None:
        self.sendmsg([data])

    def sendmsg(self, buffers: Sequence[Buffer], /) -> int:
        """All of them, unlike a socket's: what is small together, as one record; the rest from where it lies."""
        parts = [memoryview(buffer).cast("B") for buffer in buffers]
        nbytes = sum(map(len, parts))
        with self._writing:
            if nbytes <= RECORD_BYTES:
                self._send([b"".join(parts)])
                return nbytes
            pieces: list[Buffer] = []
            for part in parts:
                for offset in range(0, len(part), _PIECE_BYTES):
                    pieces.append(part[offset : offset + _PIECE_BYTES])
                    if sum(map(len, pieces)) >= _PIECE_BYTES:
                        self._send(pieces)
                        pieces = []
            self._send(pieces)
        return nbytes

    def _send(self, pieces: Sequence[Buffer]) -> None:
        try:
            self._socket.sendall(self._end.seal(pieces))
        except ConnectionAbortedError:
            self._socket.sendall(self._end.to_say())  # why, to the other end
            raise

    def recv_into(self, buffer: memoryview, nbytes: int = 0, flags: int = 0, /) -> int:
        """With `MSG_WAITALL` until the buffer is full or the other end has ended it, else what is there. A timeout is
        for all of it."""
        view = buffer[: nbytes or len(buffer)]
        timeout_s = self._socket.gettimeout()
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        filled = 0
        while filled < len(view):
            count = self._end.open_into(view[filled:])
            if count == 0 or (count is None and filled and not flags & _WAIT_ALL):
                break
            if count is not None:
                filled += count
            elif not self._take(deadline_s):
                break
        return filled

    def _take(self, deadline_s: float | None) -> bool:
        """From the network; False at its end."""
        if deadline_s is not None:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError("timed out")
            self._socket.settimeout(left_s)
        count = self._socket.recv_into(self._scratch)
        self._end.take(self._scratch[:count])
        return count > 0
