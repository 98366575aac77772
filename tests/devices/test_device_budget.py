"""What a device can do, the ledger of its memory, and the pace of an emulated one."""

from __future__ import annotations

import threading

import pytest

from core.devices import Device, DeviceBudget, format_bytes, host_device, host_of, machine_of, wait_until
from core.devices.device import DeviceKind
from core.errors import OutOfDeviceMemoryError


def make_device(limit_bytes: int = 100) -> Device:
    return Device("cpu#0", 0, "cpu", "cpu", limit_bytes)


@pytest.mark.parametrize(
    ("kind", "able"),
    [
        ("cpu", {"computes_on_cpu", "is_main_memory"}),
        ("sim", {"computes_on_cpu", "is_emulated"}),
        ("cuda", {"is_gpu"}),
        ("rocm", {"is_gpu", "is_amd"}),
        ("mps", {"is_mps"}),
    ],
)
def test_what_devices_can_do(kind: DeviceKind, able: set[str]) -> None:
    device = Device(kind, 0, kind, kind, 1)
    names = ("computes_on_cpu", "is_main_memory", "is_emulated", "is_gpu", "is_amd", "is_mps")
    assert {name for name in names if getattr(device, name)} == able


@pytest.mark.parametrize(
    ("device", "machine", "host"),
    [
        ("cuda:0#1", "", "host"),
        ("desk/cuda:0", "desk", "desk/host"),
        ("attic-2.lan/cpu", "attic-2.lan", "attic-2.lan/host"),
        ("desk/host", "desk", "desk/host"),
        ("22528KiB@900GB/s", "", "host"),  # a card that is described
        ("24GiB@936GB/s/71TFLOPS", "", "host"),
    ],
)
def test_names_tell_the_machine(device: str, machine: str, host: str) -> None:
    assert (machine_of(device), host_of(device)) == (machine, host)


def test_what_does_not_fit_is_refused_with_numbers_and_changes_nothing() -> None:
    budget = DeviceBudget(make_device(100))
    budget.reserve("weights", 60)
    budget.reserve("kv_cache", 30)
    with pytest.raises(OutOfDeviceMemoryError) as caught:
        budget.reserve("workspace", 11)
    for part in ("cpu#0", "workspace needs 11 B", "10 B of 100 B are free", "weights 60 B", "kv_cache 30 B"):
        assert part in caught.value.message
    assert (budget.used_bytes, budget.free_bytes) == (90, 10)
    budget.reserve("workspace", 10)
    assert budget.free_bytes == 0
    budget.check_invariants()


def test_release_gives_back_some_or_all() -> None:
    budget = DeviceBudget(make_device(100))
    budget.reserve("weights", 60)
    budget.reserve("weights", 20)
    budget.release("weights", 30)
    assert budget.used_by_purpose() == {"weights": 50}
    budget.release("weights")
    budget.release("weights")
    assert budget.used_by_purpose() == {}
    assert budget.free_bytes == 100


def test_impossible_amounts_are_refused() -> None:
    budget = DeviceBudget(make_device(100))
    budget.reserve("weights", 5)
    with pytest.raises(ValueError, match="holds 5 bytes, cannot release 6"):
        budget.release("weights", 6)
    with pytest.raises(ValueError, match="-1"):
        budget.release("weights", -1)
    with pytest.raises(ValueError, match="-1"):
        budget.reserve("weights", -1)
    assert budget.used_bytes == 5


def test_the_audit_finds_a_broken_ledger() -> None:
    budget = DeviceBudget(make_device(100))
    budget._used["weights"] = 101
    with pytest.raises(AssertionError, match="more than the limit"):
        budget.check_invariants()
    budget._used["weights"] = -1
    with pytest.raises(AssertionError, match="holds no bytes"):
        budget.check_invariants()


def test_threads_together_never_exceed_the_limit() -> None:
    budget = DeviceBudget(make_device(1000))
    refused = []

    def take() -> None:
        for _ in range(400):
            try:
                budget.reserve("kv_cache", 1)
            except OutOfDeviceMemoryError:
                refused.append(1)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert budget.used_bytes == 1000
    assert len(refused) == 600


class Clock:
    """Stands still while nobody sleeps; a sleep of no length takes a moment."""

    def __init__(self) -> None:
        self.now_s = 50.0

    def perf_counter(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds or 1e-5


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    still = Clock()
    monkeypatch.setattr("core.devices.device.time", still)
    return still


def test_a_wait_ends_when_it_should(clock: Clock) -> None:
    wait_until(50.05)
    assert clock.now_s == pytest.approx(50.05, abs=1e-4)


def test_what_is_over_is_not_waited_for(clock: Clock) -> None:
    wait_until(41.0)
    assert clock.now_s == 50.0


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 1024**3, "3 GiB"), (2**50, "1024 TiB")]
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_a_part_has_no_more_than_its_own_limit() -> None:
    whole = DeviceBudget(host_device(100))
    part = DeviceBudget(host_device(40), within=whole)
    part.reserve("a", 30)
    with pytest.raises(OutOfDeviceMemoryError, match="10 B of 40 B are free"):
        part.reserve("b", 20)
    assert (part.used_bytes, whole.used_bytes) == (30, 30)
