"""How copies with GPUs are put together, on streams that only remember."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from fake_runtime import FakeRuntime
from fake_streams import FakeStreams

from core.devices import Device, DeviceBudget, host_device, pinned
from core.transfer import TransferManager, gpu_copy
from core.transfer.gpu_copy import STAGING_BYTES, Copied, GpuCopier

FIRST = Device("cuda:0", 0, "cuda", "cpu", 1 << 30)
SECOND = Device("cuda:1", 1, "cuda", "cpu:0", 1 << 30)
HOST = host_device()
TENSORS = (
    torch.randn(3, 5),
    torch.arange(24).reshape(4, 6).T[1:, ::2],
    torch.tensor([True, False]),
    torch.tensor(7.0),
    torch.empty(0, 4),
)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    fake = FakeRuntime()
    monkeypatch.setattr(pinned, "gpu_runtime", lambda: fake)
    return fake


@pytest.fixture
def budget() -> DeviceBudget:
    return DeviceBudget(host_device(3 * STAGING_BYTES))


@pytest.fixture
def manager(runtime: FakeRuntime, budget: DeviceBudget) -> Iterator[tuple[TransferManager, FakeStreams]]:
    streams = FakeStreams()
    manager = TransferManager(host=budget)
    manager._copier = GpuCopier(manager.host_buffer, streams)
    yield manager, streams
    manager.close()
    assert runtime.registered == {} and budget.used_bytes == 0


def peers(monkeypatch: pytest.MonkeyPatch, allowed: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda src, dst: allowed)


@pytest.mark.parametrize("method", ["p2p", "staged"])
@pytest.mark.parametrize("tensor", TENSORS)
def test_tensors_arrive_whole(
    manager: tuple[TransferManager, FakeStreams], monkeypatch: pytest.MonkeyPatch, method: str, tensor: torch.Tensor
) -> None:
    peers(monkeypatch, method == "p2p")
    arrived = manager[0].send(tensor, FIRST, SECOND)
    assert torch.equal(arrived, tensor) and arrived.dtype == tensor.dtype
    assert tensor.numel() == 0 or arrived.data_ptr() != tensor.data_ptr()
    assert (method, "cuda:0", "cuda:1") in manager[0].stats()


@pytest.mark.parametrize("method", ["p2p", "staged"])
def test_between_gpus_streams_wait_and_the_host_does_not(
    manager: tuple[TransferManager, FakeStreams], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    peers(monkeypatch, method == "p2p")
    transfer, streams = manager
    transfer.method(FIRST, SECOND)
    for seen in (streams.log, streams.used, streams.kept):
        seen.clear()
    transfer.send(torch.ones(8), FIRST, SECOND)
    assert streams.log[0] == "out cpu waits for compute cpu", "the source has to be written first"
    last = "out cpu" if method == "p2p" else "in cpu:0"
    assert streams.log[-1] == f"compute cpu:0 waits for event on {last}", "who reads it waits for the copy"
    assert not [line for line in streams.log if "compute cpu:0" in line][:-1], "the copy does not wait for the reader"
    assert not [line for line in streams.log if "host" in line]
    assert set(streams.used) == {"in cpu:0", "out cpu"}, "torch has the current streams of both wait for each other"
    assert set(streams.kept) == {"out cpu", "compute cpu:0"}


@pytest.mark.parametrize(("src", "dst", "stream"), [(FIRST, HOST, "out cpu"), (HOST, SECOND, "in cpu:0")])
def test_main_memory_is_written_or_free_on_return(
    manager: tuple[TransferManager, FakeStreams], src: Device, dst: Device, stream: str
) -> None:
    transfer, streams = manager
    transfer.send(torch.ones(8), src, dst)
    assert streams.log[-1] == f"the host waits for event on {stream}"
    assert set(streams.used) == {stream}


def test_what_comes_to_main_memory_may_be_given_a_place(manager: tuple[TransferManager, FakeStreams]) -> None:
    place = torch.zeros(4)
    assert manager[0].send(torch.arange(4.0), FIRST, HOST, place) is place
    assert place.tolist() == [0, 1, 2, 3]


def test_staged_transfers_share_two_registered_buffers_per_link(
    manager: tuple[TransferManager, FakeStreams],
    runtime: FakeRuntime,
    budget: DeviceBudget,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peers(monkeypatch, False)
    transfer, streams = manager
    large = torch.randint(256, (2 * STAGING_BYTES + 5,), dtype=torch.uint8)
    assert torch.equal(transfer.send(large, FIRST, SECOND), large)
    assert len(runtime.registered) == 2 and budget.used_by_purpose() == {"transfers": 2 * STAGING_BYTES}
    assert streams.log.count("out cpu waits for event on in cpu:0") == 1, "the third piece waits for the first's buffer"
    streams.log.clear()
    assert torch.equal(transfer.send(large[:9], FIRST, SECOND), large[:9])
    assert streams.log.count("out cpu waits for event on in cpu:0") == 1, "and so does the next transfer's first"
    assert budget.used_bytes == 2 * STAGING_BYTES


def test_without_room_for_buffers_staged_transfers_go_through_pageable_memory(
    manager: tuple[TransferManager, FakeStreams],
    budget: DeviceBudget,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    peers(monkeypatch, False)
    budget.reserve("others", 2 * STAGING_BYTES)
    tensor = torch.randn(10)
    assert torch.equal(manager[0].send(tensor, FIRST, SECOND), tensor)
    assert "copies are not staged" in caplog.text and "others 8 MiB" in caplog.text
    assert budget.used_by_purpose() == {"others": 2 * STAGING_BYTES}
    budget.release("others")


def test_a_link_that_lies_is_found_out_once_and_used_staged(
    manager: tuple[TransferManager, FakeStreams], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    peers(monkeypatch)
    transfer, tried = manager[0], []
    copy = GpuCopier.copy

    def lose(self: GpuCopier, tensor: torch.Tensor, src: Device, dst: Device, into: None = None) -> Copied:
        copied = copy(self, tensor, src, dst, into)
        tried.append(dst.name)
        return Copied(torch.zeros_like(copied.tensor), copied.elapsed_s)

    monkeypatch.setattr(GpuCopier, "copy", lose)
    tensor = torch.randn(10)
    for _ in range(2):
        assert torch.equal(transfer.send(tensor, FIRST, SECOND), tensor)
    assert tried == ["cuda:1"]
    assert transfer.method(FIRST, SECOND) == "staged"
    assert "does not bring what was sent" in caplog.text


def test_trying_a_link_leaves_random_numbers_as_they_were(
    manager: tuple[TransferManager, FakeStreams], monkeypatch: pytest.MonkeyPatch
) -> None:
    peers(monkeypatch)
    before = torch.get_rng_state()
    assert manager[0].method(FIRST, SECOND) == "p2p"
    assert torch.equal(torch.get_rng_state(), before)


def test_a_transfer_is_counted_when_it_has_arrived(
    manager: tuple[TransferManager, FakeStreams], monkeypatch: pytest.MonkeyPatch
) -> None:
    peers(monkeypatch)
    transfer, streams = manager
    streams.done = False
    transfer.send(torch.ones(8), FIRST, SECOND)
    assert transfer.stats() == {}
    streams.done = True
    (stats,) = transfer.stats().values()
    assert (stats.ops, stats.bytes, stats.seconds) == (1, 32, pytest.approx(2e-3))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("method", ["p2p", "staged"])
def test_between_real_gpus(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    first, second = (Device(f"cuda:{n}", n, "cuda", f"cuda:{n}", 1 << 30) for n in range(2))
    manager = TransferManager()
    if method == "staged":
        monkeypatch.setattr(manager, "method", lambda src, dst: "staged")
    for size in (1, 1000, 3 * gpu_copy.STAGING_BYTES):
        tensor = torch.randn(size, device="cuda:0")
        assert torch.equal(manager.send(tensor * 2, first, second).cpu(), (tensor * 2).cpu())
    manager.close()
