"""Copies from, to and between GPUs, on streams that nothing else uses.

A copy between two GPUs waits for what is queued on the source and for nothing on the destination, and the thread that
asks for it waits for neither: the streams that are current when it is asked for wait instead, through events. A copy
from or to main memory has ended on return, since main memory has no streams.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from core.devices import Device
from core.devices.pinned import HostBuffer

STAGING_BYTES = 4 << 20
"""Size of each of the two buffers of a link whose transfers are staged."""

PROBE_BYTES = 1 << 20
"""What is sent to see whether a link can be trusted."""


@dataclass(frozen=True, slots=True)
class Copied:
    """What has been copied, and a call for how many seconds that took: None until it is done."""

    tensor: torch.Tensor
    elapsed_s: Callable[[], float | None]


class CudaStreams:
    """What a copy needs of `torch.cuda`. Streams and events are torch's; thread-safe."""

    def __init__(self) -> None:
        self._streams: dict[tuple[str, str], Any] = {}
        self._lock = threading.Lock()

    def copying(self, torch_device: str, direction: Literal["out", "in"]) -> Any:
        """The stream for copies that leave a GPU, or come in."""
        with self._lock:
            key = torch_device, direction
            if key not in self._streams:
                self._streams[key] = torch.cuda.Stream(torch.device(torch_device))  # type: ignore[no-untyped-call]
            return self._streams[key]

    def current(self, torch_device: str) -> Any:
        """The stream on which the calling thread computes."""
        return torch.cuda.current_stream(torch.device(torch_device))

    def event(self) -> Any:
        """One that measures time."""
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        """Make it the calling thread's current one."""
        return torch.cuda.stream(stream)

    def keep(self, tensor: torch.Tensor, stream: Any) -> None:
        """The tensor's memory is given to nobody else before what is queued on the stream now is done."""
        if tensor.is_cuda:
            tensor.record_stream(stream)


class GpuCopier:
    """`buffer` gives main memory that GPUs copy from and to, or None where there is none to be had."""

    def __init__(self, buffer: Callable[[int], HostBuffer | None], streams: CudaStreams | None = None) -> None:
        self._buffer = buffer
        self._streams = streams or CudaStreams()
        self._links: dict[tuple[str, str], _StagedLink] = {}
        self._lock = threading.Lock()

    def copy(self, tensor: torch.Tensor, src: Device, dst: Device, into: torch.Tensor | None = None) -> Copied:
        """`tensor` in new memory on `dst` (or in `into` there), straight from `src`; at least one of them is a GPU."""
        streams = self._streams
        out = streams.copying(src.torch_device, "out") if src.is_gpu else None
        inward = streams.copying(dst.torch_device, "in") if dst.is_gpu else None
        # torch copies between two GPUs on the source's current stream, and has both current streams wait for each other
        worker = out if out is not None else inward
        begin, end = streams.event(), streams.event()
        if out is not None:
            out.wait_stream(streams.current(src.torch_device))
        if src.torch_device == dst.torch_device:
            inward = out
        with ExitStack() as stack:
            for stream in (inward, out):
                if stream is not None:
                    stack.enter_context(streams.use(stream))
            begin.record(worker)
            arrived = torch.empty_like(tensor, device=dst.torch_device) if into is None else into
            arrived.copy_(tensor, non_blocking=True)
            end.record(worker)
        if src.is_gpu:
            streams.keep(tensor, worker)
        self._hand_on(arrived, dst, end)
        if not (src.is_gpu and dst.is_gpu):
            end.synchronize()
        return Copied(arrived, lambda: _seconds_between(begin, end))

    def copy_staged(self, tensor: torch.Tensor, src: Device, dst: Device) -> Copied:
        """The same between two GPUs through main memory."""
        key = src.torch_device, dst.torch_device
        with self._lock:
            if key not in self._links:
                self._links[key] = _StagedLink([self._buffer(STAGING_BYTES) for _ in range(2)], self._streams)
            link = self._links[key]
        if not link.is_open:
            there = self.copy(tensor, src, _MAIN_MEMORY)
            return self.copy(there.tensor, _MAIN_MEMORY, dst)
        copied, end = link.copy(tensor, src, dst)
        self._hand_on(copied.tensor, dst, end)
        return copied

    def brings_what_was_sent(self, src: Device, dst: Device) -> bool:
        """Try a direct copy between two GPUs: some links, such as those with an IOMMU in the way, report success and
        bring nothing."""
        source = torch.Generator().manual_seed(time.time_ns())  # not torch's own: what is sampled stays as it is
        sent = torch.randint(256, (PROBE_BYTES,), dtype=torch.uint8, generator=source)
        arrived = self.copy(sent.to(src.torch_device), src, dst).tensor
        return torch.equal(arrived.to("cpu"), sent)

    def _hand_on(self, arrived: torch.Tensor, dst: Device, end: Any) -> None:
        """Whoever computes on the destination's current stream from now on finds the data there."""
        if dst.is_gpu:
            current = self._streams.current(dst.torch_device)
            current.wait_event(end)
            self._streams.keep(arrived, current)  # it was allocated on another stream

    def close(self) -> None:
        """Give the buffers back once the copies under way have ended."""
        with self._lock:
            links, self._links = self._links, {}
        for link in links.values():
            link.close()


_MAIN_MEMORY = Device("main memory", -1, "cpu", "cpu", 0)


class _StagedLink:
    """From one GPU to another through two buffers in turn: while one is copied in, the other is copied out."""

    def __init__(self, buffers: list[HostBuffer | None], streams: CudaStreams) -> None:
        self._buffers = [buffer for buffer in buffers if buffer is not None]
        self.is_open = len(self._buffers) == len(buffers)
        self._streams = streams
        self._filled, self._drained = ([streams.event() for _ in buffers] for _ in range(2))
        self._used: set[int] = set()
        self._turn = 0
        self._lock = threading.Lock()
        if not self.is_open:
            self.close()

    def copy(self, tensor: torch.Tensor, src: Device, dst: Device) -> tuple[Copied, Any]:
        """Also the event behind which the data is there."""
        streams = self._streams
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        out, inward = streams.copying(src.torch_device, "out"), streams.copying(dst.torch_device, "in")
        begin, end = streams.event(), streams.event()
        with self._lock:
            out.wait_stream(streams.current(src.torch_device))
            inward.wait_stream(out)  # so that time spent waiting for the source is not counted
            with streams.use(inward):
                arrived = torch.empty_like(flat, device=dst.torch_device)
            begin.record(inward)
            for start in range(0, flat.numel(), STAGING_BYTES):
                part = flat[start : start + STAGING_BYTES]
                with self._next_buffer(out, inward) as buffer:
                    with streams.use(out):
                        buffer[: part.numel()].copy_(part, non_blocking=True)
                    self._filled[self._turn].record(out)
                    inward.wait_event(self._filled[self._turn])
                    with streams.use(inward):
                        arrived[start : start + part.numel()].copy_(buffer[: part.numel()], non_blocking=True)
            end.record(inward)
            streams.keep(flat, out)
        return Copied(arrived.view(tensor.dtype).view(tensor.shape), lambda: _seconds_between(begin, end)), end

    @contextmanager
    def _next_buffer(self, out: Any, inward: Any) -> Iterator[torch.Tensor]:
        """Filled no sooner than what was in it has been copied on, be it another transfer's."""
        self._turn = (self._turn + 1) % len(self._buffers)
        if self._turn in self._used:
            out.wait_event(self._drained[self._turn])
        self._used.add(self._turn)
        yield self._buffers[self._turn].memory
        self._drained[self._turn].record(inward)

    def close(self) -> None:
        for turn in self._used:
            self._drained[turn].synchronize()
        for buffer in self._buffers:
            buffer.close()


def _seconds_between(begin: Any, end: Any) -> float | None:
    return float(begin.elapsed_time(end)) / 1e3 if end.query() else None
