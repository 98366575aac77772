"""GPUDirect RDMA: tensors from a GPU to one of another host past both main memories, by NIXL.

A `NixlPair` is to a `GroupPath` what NCCL's process group is, between two hosts. Each end has two slots on its GPU that
the other end writes to, and two of its own that it writes from. A tensor is cut into pieces of a slot. Each is copied
into a slot, on the GPU, and written into the same slot at the other end. That one hears from NIXL once it is there,
copies it out, and tells that the slot is free again.

UCX takes the direct way where the driver lets the network card read the GPU's memory (`nvidia_peermem`, dma-buf), and
goes through main memory where not. Either way it is timed against the link, and used only if it is quicker.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from core.network.nixl_agent import NixlAgent

SLOT_BYTES = 32 << 20
_SLOTS = 2
_PATIENCE_S = 10.0
_LOOKS_EVERY_S = 20e-6
_DESCRIBED = struct.Struct("<QI")
_ARRIVED, _FREE = b"a", b"f"


class NixlPair:
    """Two agents that know each other. One thread sends and another one receives; both raise `RuntimeError`, as process
    groups do, once the other end is gone, is silent for 10 s, or `abort` was called."""

    def __init__(self, store: Any, rank: int, device: torch.device, new_agent: Callable[[], NixlAgent]) -> None:
        """Waits for the other end, over the store. Raises `RuntimeError` and `TimeoutError`."""
        self._rank, self._device = rank, device
        self._gpu = (device.index or 0) if device.type == "cuda" else None
        self._lock = threading.Lock()
        self._arrived = self._freed = self._sent = self._taken = 0
        self._is_over = False
        self._own, self._for_other = (
            torch.zeros(_SLOTS * SLOT_BYTES, dtype=torch.uint8, device=device) for _ in range(2)
        )
        try:
            self._agent = new_agent()
            for memory in (self._own, self._for_other):
                self._agent.register_at(memory.data_ptr(), memory.nbytes, self._gpu)
            described = _DESCRIBED.pack(self._for_other.data_ptr(), self._gpu or 0)
            store.set(f"{rank}", described + self._agent.metadata())
            told = store.get(f"{1 - rank}")
            self._target, gpu = _DESCRIBED.unpack_from(told)
            self._other_gpu = None if self._gpu is None else gpu
            self._other = self._agent.meet(told[_DESCRIBED.size :])
        except (OSError, struct.error) as error:
            raise RuntimeError(str(error)) from error

    def rank(self) -> int:
        return self._rank

    def send(self, tensors: list[torch.Tensor], target: int, tag: int) -> NixlPair:
        """One tensor, uint8 `[N]`. It is at the other end when this returns."""
        for piece in torch.split(tensors[0], SLOT_BYTES):
            self._until(lambda: self._sent - self._freed < _SLOTS)
            at = self._sent % _SLOTS * SLOT_BYTES
            self._own[at : at + piece.nbytes].copy_(piece)
            self._settle()
            is_there = self._do(
                lambda at=at, piece=piece: self._agent.write(  # type: ignore[misc]
                    self._own.data_ptr() + at, piece.nbytes, self._other, self._target + at,
                    (self._gpu, self._other_gpu), _ARRIVED,
                )
            )  # fmt: skip
            self._until(is_there)
            self._sent += 1
        return self

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> NixlPair:
        """Into one tensor, uint8 `[N]`."""
        for piece in torch.split(tensors[0], SLOT_BYTES):
            self._until(lambda: self._arrived > self._taken)
            at = self._taken % _SLOTS * SLOT_BYTES
            piece.copy_(self._for_other[at : at + piece.nbytes])
            self._settle()
            self._taken += 1
            self._do(lambda: self._agent.tell(self._other, _FREE))
        return self

    def wait(self) -> None:
        """What was asked has been done: this is its own `Work`."""

    def abort(self) -> None:
        """Whoever sends or receives does so no more. Any thread."""
        self._is_over = True

    def close(self) -> None:
        """Nobody sends or receives any more."""
        self.abort()
        self._do(self._agent.close, is_last=True)

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _do(self, work: Callable[[], Any], *, is_last: bool = False) -> Any:
        if self._is_over and not is_last:
            raise RuntimeError("the pair has ended")
        try:
            return work()
        except OSError as error:
            raise RuntimeError(str(error)) from error

    def _until(self, has_come: Callable[[], bool]) -> None:
        until_s = time.monotonic() + _PATIENCE_S
        while not self._do(has_come):
            with self._lock:
                for what in self._do(self._agent.heard):
                    self._arrived += what == _ARRIVED
                    self._freed += what == _FREE
            if self._do(has_come):
                return
            if time.monotonic() > until_s:
                raise RuntimeError("the other end does not answer")
            time.sleep(_LOOKS_EVERY_S)
