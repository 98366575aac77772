"""Devices are read again and again, by a thread that costs little and ends when it should."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence

import pytest
from steering import LONGEST_WAIT_S

from core.devices import Device, DeviceReader
from core.devices.monitor import MOST_SHARE, GPUMonitor
from core.devices.readings import DeviceReading

CARDS = (Device("cuda:0", 0, "cuda", "cuda:0", 1024), Device("cuda:1", 1, "cuda", "cuda:1", 1024))


class Reader(DeviceReader):
    """Each reading tells how many there have been. Fails for as long as `error` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.error: Exception | None = None
        self.closed = False
        self.came = threading.Semaphore(0)

    def read(self, devices: Iterable[Device]) -> list[DeviceReading]:
        self.count += 1
        self.came.release()
        if self.error is not None:
            raise self.error
        return [DeviceReading(device.name, used_bytes=self.count) for device in devices]

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def reader() -> Reader:
    return Reader()


@pytest.fixture
def devices() -> list[Device]:
    return list(CARDS)


@pytest.fixture
def monitor(reader: Reader, devices: list[Device]) -> Iterator[GPUMonitor]:
    made = GPUMonitor(lambda: devices, 0.001, reader)
    yield made
    made.close()


def used(monitor: GPUMonitor) -> dict[str, int | None]:
    return {name: reading.used_bytes for name, reading in monitor.readings.items()}


def test_readings_are_the_last_ones(monitor: GPUMonitor) -> None:
    assert used(monitor) == {}
    monitor.look()
    assert used(monitor) == {"cuda:0": 1, "cuda:1": 1}
    monitor.look()
    assert used(monitor) == {"cuda:0": 2, "cuda:1": 2}


def test_devices_that_are_used_no_more_are_read_no_more(monitor: GPUMonitor, devices: list[Device]) -> None:
    monitor.look()
    del devices[0]
    monitor.look()
    assert used(monitor) == {"cuda:1": 2}


def test_a_driver_that_fails_leaves_no_old_readings(monitor: GPUMonitor, reader: Reader) -> None:
    monitor.look()
    reader.error = RuntimeError("the driver is gone")
    monitor.look()
    assert used(monitor) == {}
    reader.error = None
    monitor.look()
    assert used(monitor) == {"cuda:0": 3, "cuda:1": 3}


def test_it_looks_until_it_is_closed(monitor: GPUMonitor, reader: Reader) -> None:
    monitor.start()
    monitor.start()
    reader.error = RuntimeError("the driver is gone")
    for _ in range(3):
        assert reader.came.acquire(timeout=LONGEST_WAIT_S)
    (thread,) = [each for each in threading.enumerate() if each is monitor._thread]
    monitor.close()
    monitor.close()
    assert not thread.is_alive()
    assert reader.closed


def test_a_slow_driver_is_asked_less_often(monkeypatch: pytest.MonkeyPatch, monitor: GPUMonitor) -> None:
    waits: list[float] = []

    class Stopped(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            waits.append(timeout)
            return len(waits) == 4

    costs: Sequence[float] = (0.0, 0.5, 0.0)
    taken = iter(costs)
    monkeypatch.setattr(monitor, "look", lambda: next(taken))
    monkeypatch.setattr(monitor, "_stopped", Stopped())
    monitor._run()
    assert waits == [0.0, 0.001, 0.5 / MOST_SHARE, 0.001]
