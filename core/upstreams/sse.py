"""Server-sent events out of bytes that come in pieces of any size (WHATWG HTML, "Server-sent events")."""

from __future__ import annotations

from collections.abc import Iterator

from core.errors import UpstreamError

MAX_EVENT_BYTES = 8 << 20
"""One event: a token with all its log-probabilities takes some KiB."""
DONE = b"[DONE]"


class EventReader:
    """Holds at most one event, which is never longer than `max_bytes`."""

    def __init__(self, max_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._line = bytearray()
        self._data: list[bytes] = []
        self._held = 0

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """The data of each event that is complete now. Comments and other fields are left out.

        Raises:
            UpstreamError: an event is too long.
        """
        start = 0
        while (end := piece.find(b"\n", start)) >= 0:
            self._hold(piece[start:end])
            start = end + 1
            line = bytes(self._line).removesuffix(b"\r")
            self._line.clear()
            if line:
                if line.startswith(b"data:"):
                    self._data.append(line[5:].removeprefix(b" "))
                continue
            self._held = 0
            if self._data:
                data, self._data = b"\n".join(self._data), []
                yield data
        self._hold(piece[start:])

    def _hold(self, part: bytes) -> None:
        self._held += len(part)
        if self._held > self._max_bytes:
            raise UpstreamError(
                f"The upstream sent an event of more than {self._max_bytes} bytes.", code="upstream_too_large"
            )
        self._line += part
