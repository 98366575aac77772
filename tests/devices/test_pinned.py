"""Registered main memory, with a runtime that only remembers."""

from __future__ import annotations

import mmap

import pytest
import torch
from fake_runtime import FakeRuntime

from core.devices import DeviceBudget, host_device, pinned
from core.devices.pinned import HostBuffer
from core.errors import OutOfDeviceMemoryError


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    fake = FakeRuntime()
    monkeypatch.setattr(pinned, "gpu_runtime", lambda: fake)
    return fake


@pytest.fixture
def budget() -> DeviceBudget:
    return DeviceBudget(host_device(100_000))


@pytest.mark.parametrize("nbytes", [1, mmap.PAGESIZE, 3 * mmap.PAGESIZE + 1])
def test_memory_is_registered_in_whole_pages_and_counted(
    runtime: FakeRuntime, budget: DeviceBudget, nbytes: int
) -> None:
    buffer = HostBuffer("transfers", nbytes, pin=True, budget=budget)
    assert buffer.is_pinned and buffer.memory.shape == (nbytes,) and buffer.memory.dtype == torch.uint8
    assert runtime.registered == {buffer.memory.data_ptr(): -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE}
    assert budget.used_by_purpose() == {"transfers": nbytes}
    buffer.memory.fill_(7)
    buffer.close()
    buffer.close()
    assert runtime.registered == {} and budget.used_bytes == 0 and buffer.memory.numel() == 0


def test_memory_that_may_not_be_registered_is_used_as_it_is_and_said(
    runtime: FakeRuntime, budget: DeviceBudget, caplog: pytest.LogCaptureFixture
) -> None:
    runtime.status = 2
    buffer = HostBuffer("kv_tiers", 64, pin=True, budget=budget)
    assert not buffer.is_pinned and buffer.memory.shape == (64,)
    assert "cannot be pinned" in caplog.text and "kv_tiers" in caplog.text
    buffer.close()
    assert budget.used_bytes == 0


def test_without_gpus_the_runtime_is_left_alone(monkeypatch: pytest.MonkeyPatch, budget: DeviceBudget) -> None:
    monkeypatch.setattr(pinned, "gpu_runtime", lambda: pytest.fail("asked for"))
    buffer = HostBuffer("kv_tiers", 64, pin=False, budget=budget)
    assert not buffer.is_pinned
    buffer.close()


def test_what_does_not_fit_is_refused_before_it_is_allocated(runtime: FakeRuntime, budget: DeviceBudget) -> None:
    with pytest.raises(OutOfDeviceMemoryError, match="transfers needs"):
        HostBuffer("transfers", 100_001, pin=True, budget=budget)
    assert runtime.registered == {} and budget.used_bytes == 0


def test_what_the_system_does_not_have_leaves_nothing_reserved() -> None:
    endless = DeviceBudget(host_device(1 << 62))
    with pytest.raises(OutOfDeviceMemoryError, match="could not be had"):
        HostBuffer("kv_tiers", 1 << 60, pin=False, budget=endless)
    assert endless.used_bytes == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU")
def test_torch_knows_registered_memory_as_pinned(budget: DeviceBudget) -> None:
    buffer = HostBuffer("transfers", 10_000, pin=True, budget=budget)
    assert buffer.is_pinned and buffer.memory.is_pinned()
    again = HostBuffer("transfers", 10_000, pin=True, budget=budget)
    again.close()
    buffer.close()
