"""Both sides of the handshake over a socket: `greet` calls, `answer` is asked. Each has one deadline for all of it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable

from core.errors import ClusterRefusedError, LinkLostError, NetworkError, ProtocolError
from core.network.frames import HEADER_BYTES, Flag, Header, Opcode, check_payload, checksum, read_header, write_header
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

GREETING_S = 5.0
"""That a handshake may take in all."""
_PARTING_S = 1.0


def frame(opcode: Opcode, payload: bytes) -> bytes:
    """One of a handshake; links count their own frames from 0 afterwards."""
    return write_header(Header(opcode, Flag.CHECKED, nbytes=len(payload), checksum=checksum((payload,)))) + payload


def greet(sock: socket.socket, key: bytes, node: str, kind: LinkKind, timeout_s: float = GREETING_S) -> str:
    """Prove to a listener that this node knows the token, and have it prove the same; returns its id.

    Raises `ClusterRefusedError`, `ProtocolError`, `LinkLostError`.
    """
    deadline_s = time.monotonic() + timeout_s
    try:
        hello = encode_message(Hello(kind, node, new_nonce()))
        sock.settimeout(timeout_s)
        sock.sendall(frame(Opcode.HELLO, hello))
        told = _next(sock, Opcode.CHALLENGE, deadline_s)
        challenge = decode_message(told, Challenge)
        sock.sendall(frame(Opcode.PROOF, encode_message(prove(key, "caller", hello, told))))
        welcome = decode_message(_next(sock, Opcode.WELCOME, deadline_s), Proof)
    except TimeoutError as error:
        raise LinkLostError(f"no answer within {timeout_s:g} s") from error
    except OSError as error:
        raise LinkLostError(error.strerror or str(error)) from error
    check_proof(welcome, key, "listener", hello, told)
    return challenge.node


def _next(sock: socket.socket, wanted: Opcode, deadline_s: float) -> bytes:
    header = read_header(_exactly(sock, HEADER_BYTES, deadline_s))
    payload = _exactly(sock, _bounded(header), deadline_s)
    return _expect(header, payload, wanted)


def _exactly(sock: socket.socket, nbytes: int, deadline_s: float) -> bytes:
    data = bytearray(nbytes)
    view = memoryview(data)
    while view:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        sock.settimeout(left_s)
        received = sock.recv_into(view)
        if not received:
            raise LinkLostError("the other side has closed the connection")
        view = view[received:]
    return bytes(data)


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


async def answer(
    sock: socket.socket,
    key: bytes,
    node: str,
    admit: Callable[[Hello], Awaitable[None]] | None = None,
    timeout_s: float = GREETING_S,
) -> Hello:
    """The listener's side, on a non-blocking socket. `admit` may refuse a caller that has proved itself, by
    `ClusterRefusedError`. Raises what `greet` does; the caller has been told why."""
    try:
        return await asyncio.wait_for(_answer(sock, key, node, admit), timeout_s)
    except asyncio.TimeoutError as error:
        raise LinkLostError(f"no handshake within {timeout_s:g} s") from error
    except OSError as error:
        raise LinkLostError(error.strerror or str(error)) from error
    except NetworkError as error:
        if not isinstance(error, LinkLostError):
            told = encode_message(Refused(error.message[:512]))
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                await asyncio.wait_for(_say(sock, Opcode.REFUSED, told), _PARTING_S)
        raise


async def _answer(
    sock: socket.socket, key: bytes, node: str, admit: Callable[[Hello], Awaitable[None]] | None
) -> Hello:
    told = await _asked(sock, Opcode.HELLO)
    hello = decode_message(told, Hello)
    challenge = encode_message(Challenge(node, new_nonce()))
    await _say(sock, Opcode.CHALLENGE, challenge)
    proof = decode_message(await _asked(sock, Opcode.PROOF), Proof)
    check_proof(proof, key, "caller", told, challenge)
    if admit is not None:
        await admit(hello)
    await _say(sock, Opcode.WELCOME, encode_message(prove(key, "listener", told, challenge)))
    return hello


async def _asked(sock: socket.socket, wanted: Opcode) -> bytes:
    header = read_header(await _some(sock, HEADER_BYTES))
    return _expect(header, await _some(sock, _bounded(header)), wanted)


async def _some(sock: socket.socket, nbytes: int) -> bytes:
    loop, data = asyncio.get_running_loop(), bytearray(nbytes)
    view = memoryview(data)
    while view:
        received = await loop.sock_recv_into(sock, view)
        if not received:
            raise LinkLostError("the other side has closed the connection")
        view = view[received:]
    return bytes(data)


async def _say(sock: socket.socket, opcode: Opcode, payload: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(sock, frame(opcode, payload))
