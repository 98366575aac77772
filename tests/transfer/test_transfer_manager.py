"""Tensors arrive as they were, in memory of their own, and every transfer is counted."""

from __future__ import annotations

import threading

import pytest
import torch

from core.devices import Device
from core.transfer import TransferManager
from core.transfer.gpu_copy import GpuCopier

FIRST = Device("cpu#0", 0, "cpu", "cpu", 1 << 30)
SECOND = Device("cpu#1", 1, "cpu", "cpu", 1 << 30)
CARD = Device("cuda:0", 0, "cuda", "cuda:0", 1 << 30)
OTHER_CARD = Device("cuda:1", 1, "cuda", "cuda:1", 1 << 30)
PART = Device("cuda:0#1", 1, "cuda", "cuda:0", 1 << 30)
ROCM = Device("rocm:1", 1, "rocm", "cuda:1", 1 << 30)


class Observer:
    def __init__(self) -> None:
        self.seen: list[tuple[str, str, str, int, float]] = []

    def observe_transfer(self, method: str, src: str, dst: str, nbytes: int, seconds: float) -> None:
        self.seen.append((method, src, dst, nbytes, seconds))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_tensor_arrives_unchanged_in_its_own_memory(dtype: torch.dtype) -> None:
    tensor = (torch.randn(3, 5) * 4).to(dtype)
    arrived = TransferManager().send(tensor, FIRST, SECOND)
    assert arrived.dtype == dtype and torch.equal(arrived, tensor)
    assert arrived.data_ptr() != tensor.data_ptr()
    before = arrived.clone()
    tensor.zero_()
    assert torch.equal(arrived, before)


def test_a_view_arrives_whole() -> None:
    tensor = torch.arange(24).reshape(4, 6).T[1:, ::2]
    assert torch.equal(TransferManager().send(tensor, FIRST, SECOND), tensor)


def test_nothing_happens_within_one_logical_device() -> None:
    observer = Observer()
    manager = TransferManager(observer)
    tensor = torch.ones(4)
    assert manager.send(tensor, FIRST, FIRST) is tensor
    assert manager.stats() == {} and observer.seen == []


def test_transfers_are_counted_and_reported() -> None:
    observer = Observer()
    manager = TransferManager(observer)
    manager.send(torch.zeros(8, dtype=torch.float32), FIRST, SECOND)
    manager.send(torch.zeros(2, dtype=torch.bfloat16), FIRST, SECOND)
    manager.send(torch.zeros(1, dtype=torch.int64), SECOND, FIRST)
    stats = manager.stats()
    there, back = stats["copy", "cpu#0", "cpu#1"], stats["copy", "cpu#1", "cpu#0"]
    assert (there.ops, there.bytes) == (2, 36)
    assert (back.ops, back.bytes) == (1, 8)
    assert there.seconds > 0
    assert [entry[:4] for entry in observer.seen] == [
        ("copy", "cpu#0", "cpu#1", 32),
        ("copy", "cpu#0", "cpu#1", 4),
        ("copy", "cpu#1", "cpu#0", 8),
    ]
    assert sum(entry[4] for entry in observer.seen[:2]) == pytest.approx(there.seconds)


@pytest.mark.parametrize(
    ("src", "dst", "peers", "method"),
    [
        (CARD, OTHER_CARD, True, "p2p"),
        (CARD, OTHER_CARD, False, "staged"),
        (CARD, ROCM, False, "staged"),
        (CARD, PART, True, "copy"),
        (CARD, FIRST, True, "copy"),
        (FIRST, CARD, True, "copy"),
        (FIRST, SECOND, True, "copy"),
    ],
)
def test_the_best_method_is_chosen(
    monkeypatch: pytest.MonkeyPatch, src: Device, dst: Device, peers: bool, method: str
) -> None:
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: peers)
    monkeypatch.setattr(GpuCopier, "brings_what_was_sent", lambda self, src, dst: True)
    assert TransferManager().method(src, dst) == method


def test_threads_do_not_lose_counts() -> None:
    manager = TransferManager()

    def send() -> None:
        for _ in range(200):
            manager.send(torch.zeros(1), FIRST, SECOND)

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert manager.stats()["copy", "cpu#0", "cpu#1"].ops == 800


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU")
@pytest.mark.parametrize(("src", "dst"), [(FIRST, CARD), (CARD, FIRST), (CARD, PART)])
def test_to_from_and_within_a_card(src: Device, dst: Device) -> None:
    tensor = torch.randn(64, 64).to(src.torch_device)
    arrived = TransferManager().send(tensor, src, dst)
    assert arrived.device == torch.device(dst.torch_device)
    assert torch.equal(arrived.cpu(), tensor.cpu())
    assert arrived.data_ptr() != tensor.data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU")
def test_staging_through_pinned_memory_keeps_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = TransferManager()
    monkeypatch.setattr(manager, "method", lambda src, dst: "staged")
    tensor = torch.randn(256, 256, device="cuda:0")
    for _ in range(3):
        assert torch.equal(manager.send(tensor, CARD, PART), tensor)
    torch.cuda.synchronize()
    assert manager.stats()["staged", "cuda:0", "cuda:0#1"].ops == 3
    manager.close()
