"""Two links in this process that send each other payloads."""

from __future__ import annotations

import socket
from collections.abc import Callable

from network.recorder import Recorder
from steering import until

from core.network.frames import Opcode
from core.network.link import Link
from core.network.nixl_agent import Agent
from core.network.rdma import no_agent


class Ends:
    """Both ends of a connection."""

    def __init__(
        self,
        sockets: tuple[socket.socket, socket.socket],
        near: Callable[[], Agent] = no_agent,
        far: Callable[[], Agent] = no_agent,
    ) -> None:
        self.here, self.there = Recorder(), Recorder()
        self.near = Link(sockets[0], 1, 2, self.here, name="near", new_agent=near)
        self.far = Link(sockets[1], 2, 1, self.there, name="far", new_agent=far)
        self.near.start()
        self.far.start()

    def send(self, data: bytes, opcode: Opcode = Opcode.KV_PAGES) -> tuple[int, bytes]:
        """How the payload came, and what came."""
        count = len(self.there.frames)
        self.near.send(opcode, [data])
        until(lambda: len(self.there.frames) > count or bool(self.there.errors), "the payload")
        header, came = self.there.frames[-1]
        return header.flags, came

    def close(self) -> None:
        self.near.close()
        self.far.close()
