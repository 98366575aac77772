"""The transfer manager: every tensor that crosses from one logical device to another goes through `send`.

Methods, best first:

- `p2p`: between two GPUs that can read each other's memory;
- `staged`: between two GPUs that cannot, through pinned host memory;
- `copy`: everything else: to and from the CPU, and between parts of one physical device, where the copy is real too,
  so that no two logical devices ever share memory.

`send` returns when the data has arrived. Callers treat the returned tensor as theirs and the sent one as given away;
with that, a later version can return a handle that is waited for instead, and transfers overlap with compute.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch

from core.devices import Device

TransferMethod = Literal["p2p", "staged", "copy"]
Link = tuple[TransferMethod, str, str]


class TransferObserver(Protocol):
    """What metrics offer to be told of transfers."""

    def observe_transfer(self, method: str, src: str, dst: str, nbytes: int, seconds: float) -> None: ...


@dataclass(frozen=True, slots=True)
class TransferStats:
    """Totals of one (method, source, destination) since the start."""

    ops: int = 0
    bytes: int = 0
    seconds: float = 0.0


class TransferManager:
    """Copies tensors between logical devices; thread-safe."""

    def __init__(self, metrics: TransferObserver | None = None) -> None:
        self._metrics = metrics
        self._lock = threading.Lock()
        self._stats: dict[Link, TransferStats] = {}
        self._methods: dict[tuple[str, str], TransferMethod] = {}

    def send(self, tensor: torch.Tensor, src: Device, dst: Device) -> torch.Tensor:
        """`tensor` (any shape, on `src`) as a tensor on `dst`; the same object if both are the same logical device."""
        if src.name == dst.name:
            return tensor
        method = self.method(src, dst)
        started_s = time.perf_counter()
        if method == "staged":
            arrived = _copy_staged(tensor, dst)
        else:
            arrived = tensor.to(dst.torch_device, non_blocking=True, copy=True)
        _wait(src, dst)
        self._record((method, src.name, dst.name), tensor.nbytes, time.perf_counter() - started_s)
        return arrived

    def method(self, src: Device, dst: Device) -> TransferMethod:
        """How tensors get from `src` to `dst`."""
        key = (src.torch_device, dst.torch_device)
        with self._lock:
            if key not in self._methods:
                self._methods[key] = _choose_method(src, dst)
            return self._methods[key]

    def stats(self) -> dict[Link, TransferStats]:
        """A snapshot of the totals, keyed (method, source, destination)."""
        with self._lock:
            return dict(self._stats)

    def _record(self, link: Link, nbytes: int, seconds: float) -> None:
        with self._lock:
            old = self._stats.get(link, TransferStats())
            self._stats[link] = replace(old, ops=old.ops + 1, bytes=old.bytes + nbytes, seconds=old.seconds + seconds)
        if self._metrics is not None:
            self._metrics.observe_transfer(*link, nbytes, seconds)


def _is_gpu(device: Device) -> bool:
    return device.kind in ("cuda", "rocm")


def _choose_method(src: Device, dst: Device) -> TransferMethod:
    if not (_is_gpu(src) and _is_gpu(dst)) or src.torch_device == dst.torch_device:
        return "copy"
    return "p2p" if torch.cuda.can_device_access_peer(src.torch_device, dst.torch_device) else "staged"


def _copy_staged(tensor: torch.Tensor, dst: Device) -> torch.Tensor:
    """Through pinned host memory; torch's host allocator keeps and reuses the buffer."""
    buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    buffer.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()  # the buffer is full
    return buffer.to(dst.torch_device, non_blocking=True)


def _wait(*devices: Device) -> None:
    for device in devices:
        if _is_gpu(device):
            torch.cuda.current_stream(device.torch_device).synchronize()
        elif device.kind == "mps":
            torch.mps.synchronize()
