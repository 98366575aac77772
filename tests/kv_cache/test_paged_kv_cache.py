"""The pages' tensors: how they lie in memory, and that they are given back."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from core.devices import Device, DeviceBudget
from core.errors import OutOfDeviceMemoryError
from core.kv_cache.page_ops import LOCAL
from core.kv_cache.paged_kv_cache import PagedKVCache
from core.models.architecture import KVShape

SHAPES = {3: KVShape(2, 8, 8), 4: KVShape(1, 16, 4), 5: KVShape(2, 8, 8)}
BLOCK = 4
PAGE_BYTES = BLOCK * 4 * (2 * 16 + 20 + 2 * 16)


def make(lender_bytes: int = 10_000) -> tuple[PagedKVCache, DeviceBudget]:
    own, lender = (
        Device(f"cpu#{index}", index, "cpu", "cpu", limit) for index, limit in ((0, 10_000), (1, lender_bytes))
    )
    kv = PagedKVCache(SHAPES, 5, BLOCK, torch.float32, own, DeviceBudget(own))
    return kv, DeviceBudget(lender)


def test_a_region_is_one_allocation_that_goes_back_whole() -> None:
    kv, lender = make()
    assert kv.page_bytes == PAGE_BYTES
    kv.add_region(7, 3, lender.device, lender)
    tensors = [tensor for layer in SHAPES for tensor in kv.layer(layer, 7)]
    (storage,) = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}.values()
    assert storage.nbytes() == lender.used_bytes == 3 * PAGE_BYTES
    gone = weakref.ref(storage)
    kv.drop_region(7)
    del storage, tensors
    gc.collect()
    assert gone() is None and lender.used_by_purpose() == {}
    kv.free()


def test_layers_have_their_own_pages() -> None:
    kv, lender = make()
    kv.add_region(7, 3, lender.device, lender)
    for region, pages in ((LOCAL, 5), (7, 3)):
        for layer, shape in SHAPES.items():
            keys, values = kv.layer(layer, region)
            assert keys.shape == (pages, BLOCK, shape.num_kv_heads, shape.key_dim)
            assert values.shape == (pages, BLOCK, shape.num_kv_heads, shape.value_dim)
            assert keys.is_contiguous() and values.is_contiguous() and not keys.any() and not values.any()
            keys.fill_(layer), values.fill_(-layer)
    for region in (LOCAL, 7):
        assert all((kv.layer(layer, region)[0] == layer).all() for layer in SHAPES)
        assert all((kv.layer(layer, region)[1] == -layer).all() for layer in SHAPES)
    kv.free()


def test_pages_arrive_elsewhere_as_they_were() -> None:
    kv, lender = make()
    kv.add_region(7, 3, lender.device, lender)
    for layer in SHAPES:
        for tensor in kv.layer(layer):
            tensor.copy_(torch.randn(tensor.shape))
    kv.unpack(7, [2, 0], kv.pack(LOCAL, [1, 4]))
    for layer in SHAPES:
        for there, here in zip(kv.layer(layer, 7), kv.layer(layer), strict=True):
            assert torch.equal(there[[2, 0]], here[[1, 4]]) and not there[1].any()
    kv.free()


def test_a_lender_without_room_is_left_as_it_was() -> None:
    kv, lender = make(3 * PAGE_BYTES - 1)
    with pytest.raises(OutOfDeviceMemoryError):
        kv.add_region(7, 3, lender.device, lender)
    assert lender.used_bytes == 0
    kv.add_region(7, 2, lender.device, lender)
    kv.free()
    assert lender.used_bytes == 0


def test_main_memory_that_cannot_be_had_is_not_kept_reserved() -> None:
    kv, lender = make(1 << 60)
    with pytest.raises(OutOfDeviceMemoryError, match=r"cpu#1: .* of KV pages could not be had"):
        kv.add_region(7, 1 << 42, lender.device, lender)
    assert lender.used_bytes == 0
    kv.free()


def test_other_errors_are_what_they_are_and_keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kv, lender = make()

    def broken(*args: object, **kwargs: object) -> torch.Tensor:
        raise RuntimeError("something else")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", broken)
        with pytest.raises(RuntimeError, match="something else"):
            kv.add_region(7, 3, lender.device, lender)
    assert lender.used_bytes == 0
    kv.free()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_memory_that_cannot_be_had_is_not_kept_reserved(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    kv, lender = make()

    def full(*args: object, **kwargs: object) -> torch.Tensor:
        raise error("the device is full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", full)
        with pytest.raises(OutOfDeviceMemoryError, match=r"cpu#1: .* the device is full"):
            kv.add_region(7, 3, lender.device, lender)
    assert lender.used_bytes == 0
    kv.add_region(7, 3, lender.device, lender)
    kv.free()
