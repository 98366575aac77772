"""What the front door lets a client do, and for how long."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from core.config import ApiSettings

MAX_TARGET_BYTES = 8 * 1024
"""Longest path and query."""
MAX_HEADER_BYTES = 64 * 1024
"""Longest head of a request: its first line and all headers."""
KEEPALIVE_S = 75.0
"""How long an idle connection is kept for its next request: longer than the pools of most clients and proxies."""
DISCARD_S = 10.0
"""How long the rest of a refused body is read and dropped: most clients look for an answer only when all is sent."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds are totals, whatever trickles in meanwhile."""

    max_connections: int
    max_body_bytes: int
    max_waiting: int
    header_timeout_s: float
    body_timeout_s: float
    write_timeout_s: float
    drain_timeout_s: float

    @classmethod
    def of(cls, settings: ApiSettings, max_waiting: int) -> Limits:
        """`max_waiting` requests may be in the hands of the engine, or of other work that takes long, at a time.
        Raises the process's limit of open files, as far as it may."""
        return cls(
            max_connections=min(settings.max_connections, _file_room(settings.max_connections)),
            max_body_bytes=settings.max_body_bytes,
            max_waiting=settings.threads or max_waiting,
            header_timeout_s=settings.header_timeout_s,
            body_timeout_s=settings.body_timeout_s,
            write_timeout_s=settings.write_timeout_s,
            drain_timeout_s=settings.drain_timeout_s,
        )


FILES_OF_OTHERS = 256
"""Files that weights, tiers and logs have open."""


def _file_room(wanted: int) -> int:
    """How many of `wanted` connections may be open beside other files."""
    if sys.platform == "win32":
        return wanted
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted + FILES_OF_OTHERS:
        soft = wanted + FILES_OF_OTHERS if hard == resource.RLIM_INFINITY else min(hard, wanted + FILES_OF_OTHERS)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(16, soft - FILES_OF_OTHERS)
