"""One ledger for all that is kept in main memory."""

from __future__ import annotations

import pytest

from core.config import DeviceSettings
from core.devices import Device, MainMemory, open_main_memory, probe_machine
from core.devices.device import DeviceSpeed
from core.devices.discovery import Machine, PhysicalDevice, choose_devices
from core.errors import OutOfDeviceMemoryError

CPU = Device("cpu", 0, "cpu", "cpu", 300)
EMULATED = Device("sim", 1, "sim", "cpu", 200, DeviceSpeed(1e9, 1e12))
CARD = Device("cuda:0", 2, "cuda", "cuda:0", 5000)


def test_parties_together_cannot_exceed_it_and_the_error_says_who_holds_what() -> None:
    main = MainMemory(1000)
    part = main.open([CPU, EMULATED, CARD])
    part.reserve("streamed_weights", 400)
    with pytest.raises(OutOfDeviceMemoryError) as caught:
        part.reserve("kv_tiers", 101)
    for said in ("kv_tiers needs 101 B", "100 B of 1000 B are free", "devices 500 B", "streamed_weights 400 B"):
        assert said in caught.value.message
    assert part.used_by_purpose() == {"streamed_weights": 400}, "devices have ledgers of their own"
    part.reserve("kv_tiers", 100)
    assert part.free_bytes == main.budget.free_bytes == 0
    part.check_invariants()


def test_a_second_engine_sees_what_the_first_holds_until_that_is_gone() -> None:
    main = MainMemory(1000)
    first, second = main.open([CPU]), main.open([CPU])
    first.reserve("lent", 600)
    assert main.budget.used_by_purpose() == {"devices": 300, "lent": 600}, "both are on the same devices"
    assert second.free_bytes == 100
    with pytest.raises(OutOfDeviceMemoryError, match="lent 600 B"):
        second.reserve("lent", 101)
    second.reserve("lent", 50)
    first.release("lent")
    main.close(first)
    assert main.budget.used_by_purpose() == {"devices": 300, "lent": 50}
    assert second.used_by_purpose() == {"lent": 50}
    second.release("lent", 50)
    main.close(second)
    main.close(second)
    assert main.budget.used_by_purpose() == {}


def test_room_for_an_engine_beside_or_in_place_of_another() -> None:
    main = MainMemory(1000)
    old = main.open([CPU, EMULATED])
    old.reserve("streamed_weights", 100)
    main.budget.reserve("transfers", 50)
    assert main.room_bytes([CPU]) == 1000 - 500 - 100 - 50
    assert main.room_bytes([CPU], old) == 1000 - 300 - 50
    assert main.room_bytes([CPU, Device("big", 0, "cpu", "cpu", 10_000)], old) == 0


def test_devices_larger_than_it_leave_nothing_to_others() -> None:
    main = MainMemory(100)
    part = main.open([CPU])
    assert (main.budget.used_by_purpose(), part.free_bytes) == ({"devices": 100}, 0)
    main.close(part)
    assert main.budget.used_bytes == 0


def test_cards_take_none_of_it() -> None:
    main = MainMemory(100)
    assert main.open([CARD]).free_bytes == main.room_bytes([CARD]) == 100


def test_it_is_a_share_of_what_is_free() -> None:
    whole, half = (open_main_memory(DeviceSettings(memory_fraction=share)).budget.free_bytes for share in (1.0, 0.5))
    assert 0.3 * whole < half < 0.7 * whole, "measured one after the other"
    assert whole <= probe_machine().cpu.total_bytes


@pytest.mark.parametrize(
    ("spec", "limits"), [(None, [700]), ("cpu", [700]), ("cpu=800B", [800]), ("cuda:0,cpu", [900, 700])]
)
def test_an_automatic_cpu_device_leaves_what_is_promised_to_others(spec: str | None, limits: list[int]) -> None:
    cpu = PhysicalDevice("cpu", "cpu", "cpu", "CPU", 2000, 1000)
    card = PhysicalDevice("cuda:0", "cuda", "cuda:0", "card", 2000, 1000)
    machine = Machine(gpus=(card,) if spec and "cuda" in spec else (), cpu=cpu)
    devices, _ = choose_devices(DeviceSettings(devices=spec, memory_fraction=0.9), machine, set_aside_bytes=200)
    assert [device.memory_limit_bytes for device in devices] == limits


def test_it_has_what_was_free_when_the_ledger_was_made() -> None:
    """Memory that has become free since then is nobody's: the ledger would lack what was promised."""
    machine = Machine(gpus=(), cpu=PhysicalDevice("cpu", "cpu", "cpu", "CPU", 2000, 1000))
    for main_bytes, limit in ((850, 650), (950, 700), (100, 0)):
        (device,), _ = choose_devices(
            DeviceSettings(memory_fraction=0.9), machine, set_aside_bytes=200, main_bytes=main_bytes
        )
        assert device.memory_limit_bytes == limit
