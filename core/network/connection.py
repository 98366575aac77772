"""What a link needs of a connection: a socket has it, and so has one that encrypts (`tls.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from core.network.frames import Buffer


class Connection(Protocol):
    """Of `socket.socket`, with its meaning and its errors. One thread receives while others send, one at a time."""

    def sendmsg(self, buffers: Sequence[Buffer], /) -> int: ...

    def sendall(self, data: Buffer, /) -> None: ...

    def recv_into(self, buffer: memoryview, nbytes: int = 0, flags: int = 0, /) -> int: ...

    def settimeout(self, value: float | None, /) -> None: ...

    def setsockopt(self, level: int, option: int, value: int, /) -> None: ...

    def getsockname(self) -> Any: ...

    def fileno(self) -> int: ...

    def shutdown(self, how: int, /) -> None: ...

    def close(self) -> None: ...
