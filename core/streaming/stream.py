"""`StreamManager`: layers of a stage that live in main memory and stream in ahead of use.

The device holds two slots, each as large as the largest streamed layer. Layers take turns: in the order of execution
the 1st, 3rd, 5th ... use slot A, the others slot B, for ever, so a layer's tensors always have the same addresses::

    compute   |1|resident|2|resident|3|resident|4|resident|1|...
    slot A    1111  333333333333333333  111111111111111111111     the next is loaded as soon as a layer is done
    slot B    2222222222222222  44444444444444444444  222222222

Before a layer runs, it waits until its slot holds its bytes; after it, the slot is handed to the next layer that uses
it, after the last to the first, so that the next pass finds it there. One loader thread per stage copies, and keeps to
the order in which slots came free.

A pass that ends in an error leaves the slots with other layers than the next pass wants. A layer that finds its slot
taken by another has it loaded and waits; nothing else has to be put right.

One thread at a time runs the stage.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from core.costs import SLOTS
from core.devices import Device, DeviceBudget
from core.devices.pinned import HostBuffer
from core.streaming.packed_layer import PackedLayer
from core.transfer import TransferManager


class Clock:
    """A device's time within a pass. On a real device what takes time takes it, and nothing has to be done for that."""

    def reach(self, layer: int) -> None:
        """Wait until the layers before `layer` are computed."""

    def resume(self) -> None:
        """Computing goes on now, after a wait."""


@dataclass(frozen=True, slots=True)
class StreamedLayers:
    """What to stream: `layers` in order, with what they take in `host`'s budget and in each slot, and who loads."""

    layers: tuple[int, ...]
    host_bytes: int
    slot_bytes: int
    host: DeviceBudget
    loader: TransferManager


@dataclass(slots=True)
class _Slot:
    """`turn` is whose bytes it holds or is being filled with; None: nobody's."""

    memory: torch.Tensor
    turn: int | None = None
    filled: Future[None] | None = None


class StreamManager:
    """The streamed layers of one stage. Reserves their memory when made; `close` gives everything back."""

    PURPOSE = "stream_slots"
    HOST_PURPOSE = "streamed_weights"

    def __init__(self, streamed: StreamedLayers, device: Device, budget: DeviceBudget, clock: Clock) -> None:
        self.streamed = streamed
        self.wait_s = 0.0
        self._device, self._budget, self._clock = device, budget, clock
        self._is_gpu = device.is_gpu
        self._reserved = [0, 0]
        self._packed: list[PackedLayer] = []
        self._masters: list[torch.Tensor] = []
        self._slots: list[_Slot] = []
        self._hooks: list[Any] = []
        self._buffer: HostBuffer | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._reserve(streamed.slot_bytes, streamed.host_bytes)

    def _reserve(self, slot_bytes: int, host_bytes: int) -> None:
        """Have at least so much set aside."""
        for index, (budget, purpose, nbytes) in enumerate((
            (self._budget, self.PURPOSE, SLOTS * slot_bytes), (self.streamed.host, self.HOST_PURPOSE, host_bytes),
        )):  # fmt: skip
            further = nbytes - self._reserved[index]
            if further > 0:
                budget.reserve(purpose, further)
                self._reserved[index] = nbytes

    def adopt(self, layers: Mapping[int, nn.Module]) -> None:
        """Take the layers over, as they are on the CPU, and begin to load. Nothing about them may be replaced later."""
        self._packed = [PackedLayer(layers[index]) for index in self.streamed.layers]
        sizes = [packed.nbytes for packed in self._packed]
        self._reserve(max(sizes), sum(sizes))
        torch_device = torch.device(self._device.torch_device)
        self._slots = [_Slot(torch.empty(max(sizes), dtype=torch.uint8, device=torch_device)) for _ in range(SLOTS)]
        self._buffer = HostBuffer(self.HOST_PURPOSE, sum(sizes), pin=self._is_gpu)  # reserved above
        self._masters = list(torch.split(self._buffer.memory, sizes))
        for turn, (packed, master) in enumerate(zip(self._packed, self._masters, strict=True)):
            packed.store(master)
            packed.move(self._slot(turn).memory)  # frees what the layer held
        for turn, index in enumerate(self.streamed.layers):
            layer = layers[index]
            self._hooks.append(layer.register_forward_pre_hook(partial(self._before, turn, index)))
            self._hooks.append(layer.register_forward_hook(partial(self._after, turn, index)))
        self._thread = ThreadPoolExecutor(
            1, f"vrm-stream-{self._device.name}", initializer=torch.set_num_threads, initargs=(1,)
        )
        for turn in range(min(SLOTS, len(self._masters))):
            self._fill(turn)

    def close(self) -> None:
        """End the loader and give all memory back. Safe to call twice, and on a manager that adopted nothing."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        for hook in self._hooks:
            hook.remove()
        for held in (self._hooks, self._packed, self._masters, self._slots):
            held.clear()
        if self._buffer is not None:
            self._buffer.close()
        self._thread = self._buffer = None
        self._budget.release(self.PURPOSE, self._reserved[0])
        self.streamed.host.release(self.HOST_PURPOSE, self._reserved[1])
        self._reserved = [0, 0]

    # -- in the stage's thread --------------------------------------------------------------------------------------

    def _slot(self, turn: int) -> _Slot:
        return self._slots[turn % SLOTS]

    def _before(self, turn: int, index: int, module: nn.Module, args: Any) -> None:
        """Wait until the slot holds this layer."""
        self._clock.reach(index)
        slot = self._slot(turn)
        if slot.turn != turn:
            self._fill(turn)
        assert slot.filled is not None
        if not slot.filled.done():
            started_s = time.perf_counter()
            slot.filled.exception()
            self.wait_s += time.perf_counter() - started_s
            self._clock.resume()
        error = slot.filled.exception()
        if error is not None:
            slot.turn = None
            raise error

    def _after(self, turn: int, index: int, module: nn.Module, args: Any, output: Any) -> None:
        """The slot is the next layer's."""
        self._clock.reach(index + 1)
        following = turn + SLOTS
        self._fill(following if following < len(self._masters) else turn % SLOTS)

    def _fill(self, turn: int) -> None:
        """Have a layer loaded into its slot, once what was computed with the slot so far is done."""
        slot = self._slot(turn)
        if slot.turn == turn:
            return
        after = None
        if self._is_gpu:
            after = torch.cuda.Event()  # type: ignore[no-untyped-call]
            after.record(torch.cuda.current_stream(self._device.torch_device))
        master = self._masters[turn]
        assert self._thread is not None
        slot.turn = turn
        slot.filled = self._thread.submit(
            self.streamed.loader.load, master, slot.memory[: master.nbytes], self._device, after
        )
