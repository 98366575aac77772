"""What links and their handlers agree on: how much may be on its way, and what becomes of what arrives."""

from __future__ import annotations

from typing import Protocol

from core.errors import NetworkError
from core.network.frames import Header, Opcode

WINDOW_BYTES = 64 << 20
"""Of payloads that one end may have sent and the other not released. Both ends count by the same rule; see `cost`."""
_LEAST_COST = 1 << 10
TELL_CREDIT_AT = WINDOW_BYTES // 8
"""What has to come together before the other end is told that it has been released."""
RDMA_BUSINESS = frozenset({Opcode.REACH, Opcode.REGION, Opcode.TAKEN, Opcode.PROBE, Opcode.PROBED})
"""What `core/network/rdma.py` hears of."""
OWN_BUSINESS = RDMA_BUSINESS | {Opcode.HEARTBEAT, Opcode.CREDIT, Opcode.BYE, Opcode.SHARE, Opcode.SHARED}
"""Of a link: no handler hears of these."""
FREE = OWN_BUSINESS | {
    Opcode.ANSWER, Opcode.RESULTS, Opcode.FAILED, Opcode.KV_ANSWER, Opcode.PARTIAL, Opcode.ECHOED,
}  # fmt: skip
"""Needs no credit: whoever asked has room for the answer."""


def cost(nbytes: int) -> int:
    """What a payload takes of the window: its bytes, at least 1 KiB, and at most what comes back in any case while the
    other end keeps to itself what is not worth telling yet."""
    return min(max(nbytes, _LEAST_COST), WINDOW_BYTES - TELL_CREDIT_AT)


class LinkHandler(Protocol):
    """What becomes of what arrives. All but `lost` are called in the thread that reads the link."""

    def buffer_for(self, header: Header) -> memoryview | None:
        """Where the payload goes, `header.nbytes` bytes or more; None: into a buffer of its own. Raises `ProtocolError`
        for what is not expected."""

    def received(self, header: Header, payload: memoryview) -> bool:
        """A frame is there. Whether its payload is done with; if not, `Link.release(header)` says so later."""

    def lost(self, error: NetworkError) -> None:
        """Once, from whichever thread noticed."""
