"""Both sides of the handshake over a socket: `introduce` calls, `answer` is asked. Each has one deadline for all of it.

With an `Identity` the handshake is inside of TLS, else in clear text, and never one instead of the other. Who comes the
other way is told so by a `REFUSED` in clear text, which is no more than a reason to print: nothing is tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable, Iterator

from core.errors import ClusterRefusedError, LinkLostError, NetworkError, ProtocolError
from core.network.certificates import Identity
from core.network.connection import Connection
from core.network.frames import (
    HEADER_BYTES,
    MAGIC,
    Flag,
    Header,
    Opcode,
    check_payload,
    checksum,
    read_header,
    write_header,
)
from core.network.handshake import (
    Challenge,
    Hello,
    LinkKind,
    Proof,
    Refused,
    check_proof,
    decode_message,
    encode_message,
    new_nonce,
    prove,
)
from core.network.tls import OPENING_BYTES, RECORD_BYTES, TlsConnection, TlsEnd, begins_tls, record_rest

CALLER_ENCRYPTS = "the caller encrypts its connections and the listener does not (cluster.tls, --cluster-tls)"
LISTENER_ENCRYPTS = "the listener encrypts its connections and the caller does not (cluster.tls, --cluster-tls)"
GREETING_S = 5.0
"""That a handshake may take in all."""
_PARTING_S = 1.0


def frame(opcode: Opcode, payload: bytes) -> bytes:
    """One of a handshake; links count their own frames from 0 afterwards."""
    return write_header(Header(opcode, Flag.CHECKED, nbytes=len(payload), checksum=checksum((payload,)))) + payload


def introduce(
    sock: socket.socket, key: bytes, node: str, kind: LinkKind, identity: Identity | None = None,
    timeout_s: float = GREETING_S,
) -> Connection:  # fmt: skip
    """`greet` a listener, with an identity over TLS; returns what the link goes over. The caller closes the socket
    where this fails. Raises what `greet` does."""
    deadline_s = time.monotonic() + timeout_s
    with _told_in_time(timeout_s):
        connection: Connection = sock if identity is None else _encrypt(sock, identity, deadline_s)
        _greet(connection, key, node, kind, deadline_s)
    return connection


def _encrypt(sock: socket.socket, identity: Identity, deadline_s: float) -> TlsConnection:
    end = TlsEnd(identity, listens=False)
    end.go_on()
    sock.sendall(end.to_say())
    opening = _exactly(sock, OPENING_BYTES, deadline_s)
    if opening.startswith(MAGIC[:3]):
        header = read_header(opening + _exactly(sock, HEADER_BYTES - OPENING_BYTES, deadline_s))
        _expect(header, _exactly(sock, _bounded(header), deadline_s), Opcode.REFUSED)  # raises what it says
    if not begins_tls(opening):
        raise ProtocolError("what is there does not speak TLS")
    end.take(opening)
    scratch = memoryview(bytearray(RECORD_BYTES))
    while not end.is_open:
        end.go_on()
        sock.sendall(end.to_say())
        if not end.is_open:
            end.take(scratch[: _received(sock, scratch, deadline_s)])
    return TlsConnection(sock, end)


@contextlib.contextmanager
def _told_in_time(timeout_s: float) -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise LinkLostError(f"no answer within {timeout_s:g} s") from error
    except OSError as error:
        raise LinkLostError(error.strerror or str(error)) from error


def greet(sock: Connection, key: bytes, node: str, kind: LinkKind, timeout_s: float = GREETING_S) -> str:
    """Prove to a listener that this node knows the token, and have it prove the same; returns its id. Over TLS the
    proofs hold for this connection alone.

    Raises `ClusterRefusedError`, `ProtocolError`, `LinkLostError`.
    """
    with _told_in_time(timeout_s):
        return _greet(sock, key, node, kind, time.monotonic() + timeout_s)


def _greet(sock: Connection, key: bytes, node: str, kind: LinkKind, deadline_s: float) -> str:
    binding = sock.binding if isinstance(sock, TlsConnection) else b""
    hello = encode_message(Hello(kind, node, new_nonce(), tls=bool(binding)))
    sock.sendall(frame(Opcode.HELLO, hello))  # into the kernel's buffer, which is empty so far
    told = _next(sock, Opcode.CHALLENGE, deadline_s)
    challenge = decode_message(told, Challenge)
    sock.sendall(frame(Opcode.PROOF, encode_message(prove(key, "caller", hello, told, binding))))
    welcome = decode_message(_next(sock, Opcode.WELCOME, deadline_s), Proof)
    check_proof(welcome, key, "listener", hello, told, binding)
    return challenge.node


def _next(sock: Connection, wanted: Opcode, deadline_s: float) -> bytes:
    header = read_header(_exactly(sock, HEADER_BYTES, deadline_s))
    payload = _exactly(sock, _bounded(header), deadline_s)
    return _expect(header, payload, wanted)


def _exactly(sock: Connection, nbytes: int, deadline_s: float) -> bytes:
    data = bytearray(nbytes)
    view = memoryview(data)
    while view:
        view = view[_received(sock, view, deadline_s) :]
    return bytes(data)


def _received(sock: Connection, view: memoryview, deadline_s: float) -> int:
    """How many bytes have come into the view, at least one."""
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    sock.settimeout(left_s)
    received = sock.recv_into(view)
    if not received:
        raise LinkLostError("the other side has closed the connection")
    return received


def _bounded(header: Header) -> int:
    """The payload's size, if it is of a handshake."""
    if header.opcode > Opcode.REFUSED:
        raise ProtocolError(f"{header.opcode.name} before the handshake is over")
    return header.nbytes


def _expect(header: Header, payload: bytes, wanted: Opcode) -> bytes:
    check_payload(header, payload)
    if header.opcode is Opcode.REFUSED:
        raise ClusterRefusedError(decode_message(payload, Refused).reason)
    if header.opcode is not wanted:
        raise ProtocolError(f"{header.opcode.name} instead of {wanted.name}")
    return payload


class _Called:
    """A listener's non-blocking socket during the handshake: in clear text until `encrypt`."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._end: TlsEnd | None = None
        self._scratch = memoryview(bytearray(RECORD_BYTES))

    @property
    def connection(self) -> Connection:
        """What the link goes over."""
        return self._socket if self._end is None else TlsConnection(self._socket, self._end)

    @property
    def binding(self) -> bytes:
        return b"" if self._end is None else self._end.binding

    async def encrypt(self, identity: Identity, opening: bytes) -> None:
        """The listener's side of TLS; `opening` has been read already."""
        self._end = TlsEnd(identity, listens=True)
        self._end.take(opening)
        while not self._end.is_open:
            await self._take(self._end)
            try:
                self._end.go_on()
            finally:  # an alert, where it fails
                await self._send(self._end.to_say())

    async def exactly(self, nbytes: int) -> bytes:
        loop, data = asyncio.get_running_loop(), bytearray(nbytes)
        view = memoryview(data)
        while view:
            if self._end is None:
                received: int | None = await loop.sock_recv_into(self._socket, view)
            else:
                received = self._end.open_into(view)
            if received is None:
                assert self._end is not None
                await self._take(self._end)
            elif not received:
                raise LinkLostError("the other side has closed the connection")
            else:
                view = view[received:]
        return bytes(data)

    async def _take(self, end: TlsEnd) -> None:
        count = await asyncio.get_running_loop().sock_recv_into(self._socket, self._scratch)
        if not count:
            raise LinkLostError("the other side has closed the connection")
        end.take(self._scratch[:count])

    async def say(self, opcode: Opcode, message: Challenge | Proof | Refused) -> None:
        data = frame(opcode, encode_message(message))
        await self._send(data if self._end is None else self._end.seal([data]))

    async def _send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._socket, data)


async def answer(
    sock: socket.socket,
    key: bytes,
    node: str,
    admit: Callable[[Hello], Awaitable[None]] | None = None,
    timeout_s: float = GREETING_S,
    identity: Identity | None = None,
) -> tuple[Hello, Connection]:
    """The listener's side, on a non-blocking socket; what the caller is, and what the link goes over. `admit` may
    refuse a caller that has proved itself, by `ClusterRefusedError`. Raises what `greet` does; the caller has been told
    why."""
    called = _Called(sock)
    try:
        return await asyncio.wait_for(_answer(called, key, node, admit, identity), timeout_s)
    except asyncio.TimeoutError as error:
        raise LinkLostError(f"no handshake within {timeout_s:g} s") from error
    except OSError as error:
        raise LinkLostError(error.strerror or str(error)) from error
    except NetworkError as error:
        if not isinstance(error, LinkLostError):
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                await asyncio.wait_for(called.say(Opcode.REFUSED, Refused(error.message[:512])), _PARTING_S)
        raise


async def _answer(
    called: _Called, key: bytes, node: str, admit: Callable[[Hello], Awaitable[None]] | None,
    identity: Identity | None,
) -> tuple[Hello, Connection]:  # fmt: skip
    told = await _hello(called, identity)
    hello = decode_message(told, Hello)
    if hello.tls is not (identity is not None):  # somebody in between has changed what kind of connection it is
        raise ClusterRefusedError(CALLER_ENCRYPTS if hello.tls else LISTENER_ENCRYPTS)
    challenge = Challenge(node, new_nonce())
    said, binding = encode_message(challenge), called.binding
    await called.say(Opcode.CHALLENGE, challenge)
    proof = decode_message(await _asked(called, Opcode.PROOF), Proof)
    check_proof(proof, key, "caller", told, said, binding)
    if admit is not None:
        await admit(hello)
    await called.say(Opcode.WELCOME, prove(key, "listener", told, said, binding))
    return hello, called.connection


async def _hello(called: _Called, identity: Identity | None) -> bytes:
    """The first message, inside of TLS if there is an identity. Raises for a caller that comes the other way, once its
    first message has been read: a socket that is closed on unread bytes takes back what it was about to say."""
    opening = await called.exactly(OPENING_BYTES)
    if identity is None:
        if begins_tls(opening):
            await called.exactly(record_rest(opening))
            raise ClusterRefusedError(CALLER_ENCRYPTS)
        return await _asked(called, Opcode.HELLO, opening)
    if opening.startswith(MAGIC[:3]):
        await _asked(called, Opcode.HELLO, opening)
        raise ClusterRefusedError(LISTENER_ENCRYPTS)
    if not begins_tls(opening):
        raise ProtocolError("this is neither TLS nor VTP")
    await called.encrypt(identity, opening)
    return await _asked(called, Opcode.HELLO)


async def _asked(called: _Called, wanted: Opcode, opening: bytes = b"") -> bytes:
    header = read_header(opening + await called.exactly(HEADER_BYTES - len(opening)))
    return _expect(header, await called.exactly(_bounded(header)), wanted)
