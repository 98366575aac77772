"""Bytes of frames into sockets and out of them, large payloads piece by piece."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from core.errors import LinkLostError, ProtocolError
from core.network.connection import Connection
from core.network.frames import MIB, TRAILER_BYTES, Buffer, Flag, Header, Sum, check_payload

_PIECE_BYTES = MIB
"""Of a payload that is summed while it travels: few enough calls, and still in a cache when it is sent."""
_WAIT_ALL = getattr(socket, "MSG_WAITALL", 0)


def send_all(sock: Connection, parts: list[Buffer]) -> None:
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


def send_summed(sock: Connection, head: bytes, parts: Sequence[memoryview]) -> None:
    """A large payload piece by piece, its checksum behind it: the other end reads a piece while the next is summed."""
    total = Sum()
    first: list[Buffer] = [head]
    for part in parts:
        for offset in range(0, len(part), _PIECE_BYTES):
            piece = part[offset : offset + _PIECE_BYTES]
            total.add(piece)
            send_all(sock, [*first, piece])
            first = []
    send_all(sock, [total.trailer()])


def receive_payload(sock: Connection, header: Header, payload: memoryview) -> None:
    """All of it, checked. Raises `ProtocolError` if it is not what was sent, and what `receive_all` does."""
    if not header.flags & Flag.TRAILED:
        receive_all(sock, payload)
        check_payload(header, payload)
        return
    total = Sum()
    for offset in range(0, len(payload), _PIECE_BYTES):
        piece = payload[offset : offset + _PIECE_BYTES]
        receive_all(sock, piece)
        total.add(piece)
    trailer = memoryview(bytearray(TRAILER_BYTES))
    receive_all(sock, trailer)
    if trailer != total.trailer():
        raise ProtocolError(f"{header.opcode.name}: the payload's checksum is wrong")


def receive_all(sock: Connection, view: memoryview) -> None:
    """Fill the view. Raises `LinkLostError` if the other end closes before."""
    while view:
        received = sock.recv_into(view, 0, _WAIT_ALL)
        if not received:
            raise LinkLostError("the other end has closed the connection")
        view = view[received:]
