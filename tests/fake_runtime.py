"""A GPU runtime that only remembers which main memory is registered."""

from __future__ import annotations

import mmap


class FakeRuntime:
    """Keeps the ranges that are registered, and refuses what a real one would."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        pages = (address + nbytes - 1) // mmap.PAGESIZE - address // mmap.PAGESIZE + 1
        assert pages * mmap.PAGESIZE == nbytes, "shares no page with its neighbours"
        if not self.status:
            self.registered[address] = nbytes
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        return 0 if self.registered.pop(address, None) else 1
