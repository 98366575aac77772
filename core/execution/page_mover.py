"""Does a stage's page operations: copies inside a region, moves between devices, saves to and loads from tiers below.

Operations are done in order. Neighbours of a kind that do not depend on each other go together, so that a move of many
pages is one transfer. Loads that nothing in the step depends on before attention go last, in a thread of their own,
layer by layer: while the first layer computes, the second one's pages arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch

from core.devices import Device
from core.devices.pinned import HostBuffer
from core.errors import PageMoveError
from core.kv_cache.page_ops import LOCAL, PageCopy, PageLoad, PageOp, PageRef, PageSave
from core.kv_cache.paged_kv_cache import PagedKVCache
from core.transfer import TransferManager

GROUP_BYTES = 64 << 20
"""What is packed for one transfer: a device that is asked for its memory back has little to spare for it."""

STAGED_BYTES = 8 << 20
"""Pages on their way between a GPU and main memory are put together in so much pinned memory."""

Op = TypeVar("Op", PageSave, PageLoad)

WaitFor = Callable[[int], None]
"""Returns once a layer's pages are there; raises what went wrong."""


class BlockBuffers(Protocol):
    """Main memory of the blocks that a step saves or loads, as far as it is here."""

    def place(self, op: PageSave | PageLoad) -> torch.Tensor:
        """Uint8 `[bytes]`, of the layers that are kept here, page-first: for each in order the K page, then the V page.
        Raises `KeyError` for a block that is not there."""


class PageMover:
    """Used by the thread that runs the stage. `offset` is where the stage's layers begin in what `buffers` has of a
    block."""

    def __init__(
        self, kv: PagedKVCache, transfer: TransferManager, host: Device, offset: int, buffers: BlockBuffers
    ) -> None:
        self._buffers = buffers
        self._kv = kv
        self._transfer = transfer
        self._host = host
        self._offset = offset
        self._layers: dict[int, slice] = {}  # of a block's bytes
        for layer, nbytes in kv.layer_bytes.items():
            self._layers[layer] = slice(offset, offset + nbytes)
            offset += nbytes
        self._staging: HostBuffer | None = None
        if kv.region(LOCAL).device.is_gpu:
            self._staging = transfer.host_buffer(max(STAGED_BYTES, kv.page_bytes))
        self._loader: ThreadPoolExecutor | None = None
        self._loading: dict[int, Future[None]] = {}

    def apply(self, ops: Sequence[PageOp]) -> WaitFor | None:
        """Do everything that has to be done before the step computes; loads may go on, and are waited for by layer.

        Raises `PageMoveError`: what pages hold is then not known.
        """
        self.finish_loads()
        try:
            return self._apply(ops)
        except (RuntimeError, OSError, MemoryError, KeyError) as error:
            raise _moved_not(error) from error

    def _apply(self, ops: Sequence[PageOp]) -> WaitFor | None:
        pending: list[PageLoad] = []
        for group in _groups(ops, max(1, GROUP_BYTES // max(1, self._kv.page_bytes))):
            if not {load.target for load in pending}.isdisjoint(_touched(group)):
                for layer in self._layers:
                    self._load_layer(pending, layer)  # a page that is loaded twice holds the later
                pending = []
            if loads := [op for op in group if isinstance(op, PageLoad)]:
                pending += loads
            elif saves := [op for op in group if isinstance(op, PageSave)]:
                self._save(saves)
            else:
                self._copy([op for op in group if isinstance(op, PageCopy)])
        return self._start_loads(pending) if pending else None

    def _copy(self, copies: Sequence[PageCopy]) -> None:
        source, target = copies[0].source[0], copies[0].target[0]
        sources, targets = [copy.source[1] for copy in copies], [copy.target[1] for copy in copies]
        if source == target:
            self._kv.copy_within(source, sources, targets)
            return
        src, dst = self._kv.region(source).device, self._kv.region(target).device
        self._kv.unpack(target, targets, self._transfer.send(self._kv.pack(source, sources), src, dst))

    def _save(self, saves: Sequence[PageSave]) -> None:
        region = saves[0].source[0]
        end = self._offset + self._kv.page_bytes
        for part, staged in self._pieces(saves, self._kv.page_bytes):
            packed = self._kv.pack(region, [save.source[1] for save in part])
            arrived = self._transfer.send(packed, self._kv.region(region).device, self._host, staged)
            for save, row in zip(part, arrived, strict=True):
                self._buffers.place(save)[self._offset : end].copy_(row)

    def _pieces(self, ops: Sequence[Op], row_bytes: int) -> Iterator[tuple[Sequence[Op], torch.Tensor | None]]:
        """Operations that are done at once, and pinned memory for a row each: all of them and None without a GPU.

        The memory is one piece's until the next is asked for. Saves and loads do not overlap: the loader's thread
        begins after a step's saves, and is waited for before the next step's.
        """
        if self._staging is None:
            yield ops, None
            return
        most = len(self._staging.memory) // row_bytes
        for first in range(0, len(ops), most):
            part = ops[first : first + most]
            yield part, self._staging.memory[: len(part) * row_bytes].view(len(part), row_bytes)

    def _start_loads(self, loads: Sequence[PageLoad]) -> WaitFor:
        if self._loader is None:
            self._loader = ThreadPoolExecutor(1, "vrm-page-loader", initializer=lambda: torch.set_num_threads(1))
        for layer in self._layers:
            self._loading[layer] = self._loader.submit(self._load_layer, loads, layer)
        return self._wait_for

    def _wait_for(self, layer: int) -> None:
        error = self._loading[layer].exception()
        if error is not None:
            raise _moved_not(error) from error

    def finish_loads(self) -> None:
        """Wait for loads that were begun. Raises `PageMoveError` if one failed: blocks hold what is not theirs."""
        loading, self._loading = self._loading, {}
        errors = [error for future in loading.values() if (error := future.exception()) is not None]
        if errors:
            raise _moved_not(errors[0]) from errors[0]

    def _load_layer(self, loads: Sequence[PageLoad], layer: int) -> None:
        """One layer's bytes of all blocks that are loaded, in one transfer per region."""
        regions, at = sorted({load.target[0] for load in loads}), self._layers[layer]
        with torch.inference_mode():
            for region in regions:
                mine = [load for load in loads if load.target[0] == region]
                for part, staged in self._pieces(mine, at.stop - at.start):
                    data = torch.stack([self._buffers.place(load)[at] for load in part], out=staged)
                    arrived = self._transfer.send(data, self._host, self._kv.region(region).device)
                    self._kv.unpack(region, [load.target[1] for load in part], arrived, (layer,))

    def close(self) -> None:
        """End the thread and give pinned memory back."""
        self._loading = {}
        if self._loader is not None:
            self._loader.shutdown()
            self._loader = None
        if self._staging is not None:
            self._staging.close()
            self._staging = None


def _moved_not(error: BaseException) -> PageMoveError:
    return PageMoveError(f"KV pages could not be moved: {error}")


def _groups(ops: Iterable[PageOp], most: int) -> Iterable[list[PageOp]]:
    """Runs of at most `most` operations that may be done at once: of one kind between the same regions, none of them
    reading or writing what another one has written."""
    group: list[PageOp] = []
    written: set[PageRef] = set()
    for op in ops:
        if group and (len(group) == most or _kind(op) != _kind(group[0]) or not written.isdisjoint(_touched([op]))):
            yield group
            group, written = [], set()
        group.append(op)
        if not isinstance(op, PageSave):
            written.add(op.target)
    if group:
        yield group


def _touched(ops: Iterable[PageOp]) -> set[PageRef]:
    """Pages that are read or written."""
    touched = set()
    for op in ops:
        if not isinstance(op, PageLoad):
            touched.add(op.source)
        if not isinstance(op, PageSave):
            touched.add(op.target)
    return touched


def _kind(op: PageOp) -> tuple[object, ...]:
    if isinstance(op, PageCopy):
        return PageCopy, op.source[0], op.target[0]
    return (PageSave, op.source[0]) if isinstance(op, PageSave) else (PageLoad,)
