"""Where segment files are kept: what `SegmentStore` asks of a directory or an object store."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import Protocol

from core.tiers.segments import SUFFIX


def new_name() -> str:
    """A name that no other process takes; names sort by age."""
    return f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}{SUFFIX}"


class OpenFile(Protocol):
    """A segment that is being written, under a name that nobody looks for."""

    def write_at(self, offset: int, data: bytes | memoryview) -> None: ...

    def read_at(self, offset: int, into: memoryview) -> int: ...

    def seal(self) -> str:
        """Make it lasting and give it its name, which is returned. It can still be read here until `close`."""

    def close(self) -> None: ...

    def discard(self) -> None:
        """Close it and remove what was written."""


@dataclass(frozen=True, slots=True)
class SegmentFile:
    """A file found at the start; names sort by age."""

    name: str
    nbytes: int


class SegmentFiles(Protocol):
    """Where segments live. Raises `OSError`."""

    def list(self) -> list[SegmentFile]: ...

    def read(self, name: str, offset: int, into: memoryview) -> int:
        """Fill `into` from the file; bytes read, fewer at its end."""

    def start(self) -> OpenFile: ...

    def delete(self, name: str) -> None: ...

    def free_bytes(self) -> int | None:
        """Bytes that can still be written there; None if that is not known."""

    def close(self) -> None: ...
