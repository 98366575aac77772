"""The transfer manager: every tensor that crosses from one logical device to another goes through `send`.

Methods, best first:

- `p2p`: between two GPUs that can read each other's memory;
- `staged`: between two GPUs that cannot, through pinned host memory;
- `copy`: everything else: to and from the CPU, and between parts of one physical device, where the copy is real too,
  so that no two logical devices ever share memory.

Weights that stream in from main memory go through `load`, as method `stream` from "host".

`send` returns when the data has arrived. The tensor's contents must be complete when it is called. Callers treat the
returned tensor as theirs and the sent one as given away. GPUs copy on streams of their own, so that a transfer made in
one thread overlaps with what the devices compute for another.
"""

from __future__ import annotations

import functools
import threading
import time
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch

from core.devices import HOST, Device, LinkSpeed, wait_until

TransferMethod = Literal["p2p", "staged", "copy", "stream"]
Link = tuple[TransferMethod, str, str]

STAGING_BYTES = 4 << 20
"""Size of each of the two pinned buffers of a staged transfer."""

LOAD_BYTES = 32 << 20
"""Weights are loaded in pieces of this size, between which a GPU can receive activations."""


class TransferObserver(Protocol):
    """What metrics offer to be told of transfers."""

    def observe_transfer(self, method: str, src: str, dst: str, nbytes: int, seconds: float) -> None: ...


class Inlet(Protocol):
    """Where a stage takes hidden states (`core.execution.stage_handle`)."""

    @property
    def device(self) -> Device: ...

    def put(self, step: int, hidden: torch.Tensor) -> None: ...


@dataclass(frozen=True, slots=True)
class TransferStats:
    """Totals of one (method, source, destination) since the start."""

    ops: int = 0
    bytes: int = 0
    seconds: float = 0.0


class TransferManager:
    """Copies tensors between logical devices; thread-safe."""

    def __init__(self, metrics: TransferObserver | None = None, *, sim_link: LinkSpeed | None = None) -> None:
        self._metrics = metrics
        self._sim_link = sim_link
        self._lock = threading.Lock()
        self._stats: dict[Link, TransferStats] = {}
        self._methods: dict[tuple[str, str], TransferMethod] = {}

    def send(self, tensor: torch.Tensor, src: Device, dst: Device) -> torch.Tensor:
        """`tensor` (any shape, on `src`) as a tensor on `dst`; the same object if both are the same logical device."""
        if src.name == dst.name:
            return tensor
        method = self.method(src, dst)
        started_s = time.perf_counter()
        if src.is_gpu or dst.is_gpu:
            arrived = _copy_gpu(tensor, src, dst, method)
        else:
            arrived = tensor.to(dst.torch_device, copy=True)
            if src.is_mps or dst.is_mps:
                torch.mps.synchronize()
        if self._is_emulated(src, dst) and self._sim_link is not None:
            wait_until(started_s + self._sim_link.transfer_s(tensor.nbytes))
        self._record((method, src.name, dst.name), tensor.nbytes, time.perf_counter() - started_s)
        return arrived

    def hand_on(self, hidden: torch.Tensor, src: Device, inlet: Inlet, step: int) -> None:
        """Bring a step's hidden states from `src` to where the following stage takes them."""
        inlet.put(step, self.send(hidden, src, inlet.device))

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


def _choose_method(src: Device, dst: Device) -> TransferMethod:
    if not (src.is_gpu and dst.is_gpu) or src.torch_device == dst.torch_device:
        return "copy"
    return "p2p" if torch.cuda.can_device_access_peer(src.torch_device, dst.torch_device) else "staged"


@functools.lru_cache(maxsize=64)
def _copy_stream(torch_device: str) -> torch.cuda.Stream:
    """A stream for copies from or to a GPU."""
    return torch.cuda.Stream(torch.device(torch_device))  # type: ignore[no-untyped-call]


@functools.lru_cache(maxsize=64)
def _load_stream(torch_device: str) -> torch.cuda.Stream:
    """A stream for weights, which what the stages send each other need not wait for."""
    return torch.cuda.Stream(torch.device(torch_device))  # type: ignore[no-untyped-call]


def _copy_gpu(tensor: torch.Tensor, src: Device, dst: Device, method: TransferMethod) -> torch.Tensor:
    """A copy to or from a GPU, or between two."""
    if method == "staged":
        return _copy_staged(tensor, src, dst)
    stream = _copy_stream(src.torch_device if src.is_gpu else dst.torch_device)
    _wait_for_producer(stream, src)
    with torch.cuda.stream(stream):
        arrived = tensor.to(dst.torch_device, non_blocking=True, copy=True)
    stream.synchronize()
    return _for_consumer(arrived)


def _wait_for_producer(stream: torch.cuda.Stream, src: Device) -> None:
    """The copy begins when what is queued on the source is done: the tensor may still be being made."""
    if src.is_gpu:
        stream.wait_stream(torch.cuda.current_stream(torch.device(src.torch_device)))


def _for_consumer(arrived: torch.Tensor) -> torch.Tensor:
    """Memory that was allocated on a copy stream is not given to the next copy before the reader is done."""
    if arrived.is_cuda:
        arrived.record_stream(torch.cuda.current_stream(arrived.device))
    return arrived


def _copy_staged(tensor: torch.Tensor, src: Device, dst: Device) -> torch.Tensor:
    """Through two pinned buffers in turn: while one is copied in, the other is copied out."""
    flat = tensor.contiguous().view(-1)
    out, inward = _copy_stream(src.torch_device), _copy_stream(dst.torch_device)
    _wait_for_producer(out, src)
    with torch.cuda.stream(inward):
        arrived = torch.empty_like(flat, device=dst.torch_device)
    length = max(1, min(flat.numel(), STAGING_BYTES // flat.element_size()))
    buffers = [torch.empty(length, dtype=flat.dtype, pin_memory=True) for _ in range(2)]
    filled, drained = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))  # type: ignore[no-untyped-call]
    for turn, start in enumerate(range(0, flat.numel(), length)):
        part, which = flat[start : start + length], turn % 2
        buffer = buffers[which][: part.numel()]
        with torch.cuda.stream(out):
            if turn >= 2:
                out.wait_event(drained[which])
            buffer.copy_(part, non_blocking=True)
            filled[which].record(out)
        with torch.cuda.stream(inward):
            inward.wait_event(filled[which])
            arrived[start : start + part.numel()].copy_(buffer, non_blocking=True)
            drained[which].record(inward)
    inward.synchronize()
    return _for_consumer(arrived).view(tensor.shape)
