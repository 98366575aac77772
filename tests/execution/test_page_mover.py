"""Pages go to main memory and come back through pinned memory that is smaller than they are."""

from __future__ import annotations

import pytest
import torch
from fake_runtime import FakeRuntime
from fake_streams import FakeStreams

from core.devices import Device, DeviceBudget, host_device, pinned
from core.execution import page_mover
from core.execution.page_mover import PageMover
from core.kv_cache.page_ops import LOCAL, PageLoad, PageSave
from core.kv_cache.paged_kv_cache import PagedKVCache
from core.models.architecture import KVShape
from core.transfer import TransferManager
from core.transfer.gpu_copy import GpuCopier

SHAPES = {0: KVShape(2, 8, 8), 1: KVShape(1, 4, 4)}
PAGES = 7


class Buffers(dict[bytes, torch.Tensor]):
    def place(self, op: PageSave | PageLoad) -> torch.Tensor:
        return self[op.block_hash]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("pages_at_once", [1, 2, 100])
def test_pages_come_back_as_they_were(kind: str, pages_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, ledger = FakeRuntime(), DeviceBudget(host_device(1 << 20))
    monkeypatch.setattr(pinned, "gpu_runtime", lambda: runtime)
    transfer = TransferManager(host=ledger)
    transfer._copier = GpuCopier(transfer.host_buffer, FakeStreams())
    card = Device(kind, 0, kind, "cpu", 1 << 20)  # type: ignore[arg-type]
    kv = PagedKVCache(SHAPES, PAGES, 4, torch.float32, card, DeviceBudget(card))
    monkeypatch.setattr(page_mover, "STAGED_BYTES", pages_at_once * kv.page_bytes)
    tensors = [tensor for layer in SHAPES for tensor in kv.layer(layer)]
    for tensor in tensors:
        tensor.copy_(torch.randn(tensor.shape))
    before = [tensor.clone() for tensor in tensors]

    offset = 16  # of other stages' layers
    buffers = Buffers((bytes([n]), torch.zeros(offset + kv.page_bytes, dtype=torch.uint8)) for n in range(PAGES))
    mover = PageMover(kv, transfer, host_device(), offset, buffers)
    staged = pages_at_once * kv.page_bytes
    assert ledger.used_by_purpose() == ({"transfers": staged} if kind == "cuda" else {})
    assert len(runtime.registered) == (kind == "cuda")
    assert mover.apply([PageSave((LOCAL, page), block_hash, page) for page, block_hash in enumerate(buffers)]) is None
    for tensor in tensors:
        tensor.zero_()
    order = [3, 0, 6, 1, 5, 2, 4]
    wait_for = mover.apply([PageLoad(bytes([page]), (LOCAL, target), page) for target, page in enumerate(order)])
    assert wait_for is not None
    for layer in SHAPES:
        wait_for(layer)
    for tensor, kept in zip(tensors, before, strict=True):
        assert torch.equal(tensor, kept[order])
    mover.close()
    assert ledger.used_bytes == 0 and runtime.registered == {}
    kv.free()
