"""The transfer manager: every tensor that crosses from one logical device to another goes through `send`.

Methods, best first:

- `p2p`: between two GPUs that can read each other's memory, once it has been seen that what is sent arrives;
- `staged`: between two GPUs that cannot, through pinned host memory;
- `copy`: everything else: to and from the CPU, and between parts of one physical device, where the copy is real too,
  so that no two logical devices ever share memory.

Weights that stream in from main memory go through `load`, as method `stream` from "host".

Callers treat the tensor that `send` returns as theirs and the sent one as given away. In main memory the returned data
is there, and a sent tensor is free to be written again. On a GPU it is there for whatever is queued from then on on the
stream that is current for that GPU in the calling thread; other streams and other threads' own have to wait for that
one. What is sent from a GPU is what its current stream will have written by then. Copies have streams of their own: see
`gpu_copy`.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from core.devices import HOST, Device, DeviceBudget, LinkSpeed, format_bytes, wait_until
from core.devices.pinned import HostBuffer
from core.errors import OutOfDeviceMemoryError
from core.logs import get_logger
from core.metrics import MetricsRegistry
from core.transfer.gpu_copy import GpuCopier

logger = get_logger(__name__)

TransferMethod = Literal["p2p", "staged", "copy", "stream"]
Link = tuple[TransferMethod, str, str]

LOAD_BYTES = 32 << 20
"""Weights are loaded in pieces of this size, between which a GPU can receive activations."""


@dataclass(frozen=True, slots=True)
class TransferStats:
    """Totals of one (method, source, destination) since the start."""

    ops: int = 0
    bytes: int = 0
    seconds: float = 0.0


class TransferManager:
    """Copies tensors between logical devices; thread-safe.

    `host` is the ledger of main memory that pinned buffers are on; without one they are on none. `copier` replaces what
    copies with GPUs.
    """

    PURPOSE = "transfers"

    def __init__(
        self,
        metrics: MetricsRegistry | None = None,
        *,
        sim_link: LinkSpeed | None = None,
        host: DeviceBudget | None = None,
        copier: GpuCopier | None = None,
    ) -> None:
        self._metrics = metrics
        self._host = host
        self._copier = copier or GpuCopier(self.host_buffer)
        self._choosing = threading.Lock()
        self._under_way: list[tuple[Link, int, Callable[[], float | None]]] = []
        self._sim_link = sim_link
        self._lock = threading.Lock()
        self._stats: dict[Link, TransferStats] = {}
        self._methods: dict[tuple[str, str], TransferMethod] = {}

    def send(self, tensor: torch.Tensor, src: Device, dst: Device, into: torch.Tensor | None = None) -> torch.Tensor:
        """`tensor` (any shape, on `src`) as a tensor on `dst`; the same object if both are the same logical device.

        `into` is main memory for a tensor that comes from a GPU, of its shape and dtype.
        """
        if src.name == dst.name:
            return tensor
        method = self.method(src, dst)
        started_s = time.perf_counter()
        if src.is_gpu or dst.is_gpu:
            if method == "staged":
                copied = self._copier.copy_staged(tensor, src, dst)
            else:
                copied = self._copier.copy(tensor, src, dst, into)
            with self._lock:  # it may be under way, and is recorded at a later one's or when somebody asks
                self._under_way.append(((method, src.name, dst.name), tensor.nbytes, copied.elapsed_s))
            self._settle()
            return copied.tensor
        arrived = tensor.to(dst.torch_device, copy=True)
        if src.is_mps or dst.is_mps:
            torch.mps.synchronize()
        if self._is_emulated(src, dst) and self._sim_link is not None:
            wait_until(started_s + self._sim_link.transfer_s(tensor.nbytes))
        self._record((method, src.name, dst.name), tensor.nbytes, time.perf_counter() - started_s)
        return arrived

    def load(
        self, source: torch.Tensor, target: torch.Tensor, device: Device, after: torch.cuda.Event | None = None
    ) -> None:
        """Copy weights from main memory to memory on `device`, both uint8 `[N]`; on a GPU not before `after`."""
        if after is not None:
            after.synchronize()
        started_s = time.perf_counter()
        if device.is_gpu:
            stream = _load_stream(device.torch_device)
            with torch.cuda.stream(stream):
                for part, into in zip(torch.split(source, LOAD_BYTES), torch.split(target, LOAD_BYTES), strict=True):
                    into.copy_(part, non_blocking=True)
            stream.synchronize()
        elif device.is_emulated and self._sim_link is not None:
            early = source.nbytes * 15 // 16
            target[:early].copy_(source[:early])
            wait_until(started_s + self._sim_link.transfer_s(source.nbytes))
            target[early:].copy_(source[early:])  # nobody can use it sooner than the link allows
        else:
            target.copy_(source)
            if device.is_mps:
                torch.mps.synchronize()
        self._record(("stream", HOST, device.name), source.nbytes, time.perf_counter() - started_s)

    def is_slow(self, src: Device, dst: Device) -> bool:
        """Whether a transfer takes long enough to be worth a thread that waits for it."""
        if src.name == dst.name:
            return False
        return src.is_gpu or dst.is_gpu or (self._is_emulated(src, dst) and self._sim_link is not None)

    @staticmethod
    def _is_emulated(src: Device, dst: Device) -> bool:
        return src.is_emulated or dst.is_emulated

    def method(self, src: Device, dst: Device) -> TransferMethod:
        """How tensors get from `src` to `dst`."""
        key = (src.torch_device, dst.torch_device)
        with self._choosing:
            if key not in self._methods:
                self._methods[key] = self._choose_method(src, dst)
            return self._methods[key]

    def _choose_method(self, src: Device, dst: Device) -> TransferMethod:
        if not (src.is_gpu and dst.is_gpu) or src.torch_device == dst.torch_device:
            return "copy"
        if not torch.cuda.can_device_access_peer(src.torch_device, dst.torch_device):
            return "staged"
        if not self._copier.brings_what_was_sent(src, dst):
            logger.warning("a direct link does not bring what was sent: it is not used", src=src.name, dst=dst.name)
            return "staged"
        return "p2p"

    def host_buffer(self, nbytes: int) -> HostBuffer | None:
        """Main memory that GPUs copy from and to, to be closed by the caller; None where the ledger has none left."""
        try:
            return HostBuffer(self.PURPOSE, nbytes, pin=True, budget=self._host)
        except OutOfDeviceMemoryError as error:
            logger.warning("copies are not staged", size=format_bytes(nbytes), reason=error.message)
            return None

    def close(self) -> None:
        """Give pinned buffers back. Nothing is sent any more."""
        self._copier.close()

    def stats(self) -> dict[Link, TransferStats]:
        """A snapshot of the totals of what has arrived, keyed (method, source, destination)."""
        self._settle()
        with self._lock:
            return dict(self._stats)

    def _settle(self) -> None:
        """Record what has arrived."""
        with self._lock:
            seen = [(*noted[:2], noted[2]()) for noted in self._under_way]
            self._under_way = [
                noted for noted, (*_, seconds) in zip(self._under_way, seen, strict=True) if seconds is None
            ]
        for link, nbytes, seconds in seen:
            if seconds is not None:
                self._record(link, nbytes, seconds)

    def _record(self, link: Link, nbytes: int, seconds: float) -> None:
        with self._lock:
            old = self._stats.get(link, TransferStats())
            self._stats[link] = replace(old, ops=old.ops + 1, bytes=old.bytes + nbytes, seconds=old.seconds + seconds)
        if self._metrics is not None:
            self._metrics.observe_transfer(*link, nbytes, seconds)


@functools.lru_cache(maxsize=64)
def _load_stream(torch_device: str) -> torch.cuda.Stream:
    """A stream for weights, which what the stages send each other need not wait for."""
    return torch.cuda.Stream(torch.device(torch_device))  # type: ignore[no-untyped-call]
