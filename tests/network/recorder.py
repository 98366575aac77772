"""A handler that keeps what arrives."""

from __future__ import annotations

from core.errors import NetworkError
from core.network.frames import Header


class Recorder:
    """Keeps what arrives."""

    def __init__(self) -> None:
        self.frames: list[tuple[Header, bytes]] = []
        self.errors: list[NetworkError] = []

    def buffer_for(self, header: Header) -> memoryview | None:
        return None

    def received(self, header: Header, payload: memoryview) -> bool:
        self.frames.append((header, bytes(payload)))
        return True

    def lost(self, error: NetworkError) -> None:
        self.errors.append(error)
