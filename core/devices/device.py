"""What the layers above see of hardware: logical devices, each with a memory budget, and the
ledger of main memory. No torch here."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from core.errors import OutOfDeviceMemoryError

DeviceKind = Literal["cpu", "cuda", "rocm", "mps", "sim"]

GPU_KINDS = frozenset[DeviceKind]({"cuda", "rocm"})
"""What `torch.cuda` drives."""

HOST = "host"
"""Main memory's name, as a place for what the devices have no room for: weights that stream in, blocks of KV."""

_MACHINE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")
"""A worker's name."""
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def format_bytes(count: int) -> str:
    """`count` bytes for people: "512 B", "1.5 GiB"."""
    size = float(count)
    for unit in _UNITS:
        if abs(size) < 1024 or unit == _UNITS[-1]:
            break
        size /= 1024
    return f"{count} B" if unit == "B" else f"{size:.4g} {unit}"


_COARSE_S = 0.003
"""By how much a system may oversleep."""


def wait_until(deadline_s: float) -> None:
    """Wait until `time.perf_counter()` reaches `deadline_s`: asleep for most of it, then looking at the clock."""
    remaining_s = deadline_s - time.perf_counter()
    if remaining_s > _COARSE_S:
        time.sleep(remaining_s - _COARSE_S)
    while time.perf_counter() < deadline_s:
        time.sleep(0)


@dataclass(frozen=True, slots=True)
class DeviceSpeed:
    """How fast an emulated device reads its memory (bytes/s) and computes (floating-point operations/s)."""

    bandwidth_bytes_s: float
    flops: float


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """How fast emulated devices exchange data."""

    bandwidth_bytes_s: float
    latency_s: float = 0.0

    def transfer_s(self, nbytes: int) -> float:
        """Seconds for one transfer."""
        return self.latency_s + nbytes / self.bandwidth_bytes_s


@dataclass(frozen=True, slots=True)
class Device:
    """A physical device, or a part of one.

    Attributes:
        name: unique in a process: "cuda:0", or "cuda:0#1" for the second part of a carved device.
        index: position in the list of devices in use.
        kind: what it is; "sim" computes on the CPU and waits for as long as the emulated card would have taken.
        torch_device: where its tensors live: "cpu", "cuda:0", "mps".
        memory_limit_bytes: what may be allocated on it.
        speed: given for emulated devices only.
        node: the worker that has it, empty for a device of this machine. What is said of such a device's tensors holds
            there.
    """

    name: str
    index: int
    kind: DeviceKind
    torch_device: str
    memory_limit_bytes: int
    speed: DeviceSpeed | None = None
    node: str = ""

    @property
    def is_here(self) -> bool:
        """Of this machine."""
        return not self.node

    @property
    def is_gpu(self) -> bool:
        """Driven by `torch.cuda` (CUDA or ROCm): streams, events, copies from pinned memory."""
        return self.kind in GPU_KINDS

    @property
    def is_amd(self) -> bool:
        """A GPU that `torch.cuda` drives through ROCm."""
        return self.kind == "rocm"

    @property
    def is_mps(self) -> bool:
        """Driven by `torch.mps`."""
        return self.kind == "mps"

    @property
    def computes_on_cpu(self) -> bool:
        """Its tensors are in main memory and the processor's threads compute on them."""
        return self.kind in ("cpu", "sim")

    @property
    def is_emulated(self) -> bool:
        """Stands for a card with a given speed."""
        return self.kind == "sim"

    @property
    def is_main_memory(self) -> bool:
        """Main memory as itself: what leaves the device for main memory gains nothing."""
        return self.kind == "cpu"


def host_device(limit_bytes: int = 0, node: str = "") -> Device:
    """Main memory, as a place for what devices have no room for: `limit_bytes` of it, that of a worker if `node` is
    given."""
    return Device(f"{node}/{HOST}" if node else HOST, -1, "cpu", "cpu", limit_bytes, node=node)


def machine_of(device: str) -> str:
    """The worker that has a device, by the device's name in the cluster; empty for this machine, and for cards that are
    described alone ("24GiB@936GB/s")."""
    name, _, there = device.partition("/")
    return name if there and _MACHINE.fullmatch(name) else ""


def host_of(device: str) -> str:
    """The name of the main memory of the machine that has a device."""
    return host_device(node=machine_of(device)).name


class DeviceBudget:
    """The ledger of one device's memory: who reserved how many bytes, never more than the limit. Thread-safe.

    A part of a ledger, with `within` as the whole, has what one party holds, up to its own limit; the whole has what
    all of them hold.
    """

    def __init__(self, device: Device, *, within: DeviceBudget | None = None) -> None:
        self.device = device
        self._whole = within
        self._used: dict[str, int] = {}
        self._lock = threading.Lock()

    def reserve(self, purpose: str, nbytes: int) -> None:
        """Set `nbytes` aside, before they are allocated.

        Raises:
            OutOfDeviceMemoryError: they do not fit; nothing is reserved.
        """
        if nbytes < 0:
            raise ValueError(f"cannot reserve {nbytes} bytes")
        with self._lock:
            if self._whole is not None:
                self._whole.reserve(purpose, nbytes)
            if nbytes > (free := self.device.memory_limit_bytes - sum(self._used.values())):
                if self._whole is not None:
                    self._whole.release(purpose, nbytes)
                holders = ", ".join(f"{name} {format_bytes(used)}" for name, used in self._used.items())
                raise OutOfDeviceMemoryError(
                    f"{self.device.name}: {purpose} needs {format_bytes(nbytes)} ({nbytes} bytes), but "
                    f"{format_bytes(free)} of {format_bytes(self.device.memory_limit_bytes)} are free"
                    + (f" (in use: {holders})." if holders else ".")
                )
            if nbytes:
                self._used[purpose] = self._used.get(purpose, 0) + nbytes

    def hold(self, purpose: str, nbytes: int) -> None:
        """Have `nbytes` set aside for a purpose in place of what it has now, or as many as there are."""
        with self._lock:
            others = sum(used for name, used in self._used.items() if name != purpose)
            self._used[purpose] = min(nbytes, self.device.memory_limit_bytes - others)
            if self._used[purpose] == 0:
                del self._used[purpose]

    def release(self, purpose: str, nbytes: int | None = None) -> None:
        """Give `nbytes` of a purpose back; None gives all of them, and nothing where there are none."""
        with self._lock:
            held = self._used.get(purpose, 0)
            given_back = held if nbytes is None else nbytes
            if not 0 <= given_back <= held:
                raise ValueError(f"{self.device.name}: {purpose} holds {held} bytes, cannot release {given_back}")
            if self._whole is not None:
                self._whole.release(purpose, given_back)
            self._used[purpose] = held - given_back
            if self._used[purpose] == 0:
                del self._used[purpose]

    def used_by_purpose(self) -> dict[str, int]:
        """A snapshot: bytes by purpose, without those that hold none."""
        with self._lock:
            return dict(self._used)

    @property
    def used_bytes(self) -> int:
        with self._lock:
            return sum(self._used.values())

    @property
    def free_bytes(self) -> int:
        """Of the whole, for a part of a ledger."""
        return self.device.memory_limit_bytes - self.used_bytes if self._whole is None else self._whole.free_bytes

    def check_invariants(self) -> None:
        """Raise `AssertionError` unless every purpose holds something and all together stay within the limit."""
        with self._lock:
            used = dict(self._used)
        if any(nbytes <= 0 for nbytes in used.values()):
            raise AssertionError(f"{self.device.name}: a purpose holds no bytes: {used}")
        if sum(used.values()) > self.device.memory_limit_bytes:
            raise AssertionError(
                f"{self.device.name}: {used} is more than the limit of {self.device.memory_limit_bytes} bytes"
            )
        if self._whole is not None:
            self._whole.check_invariants()


class MainMemory:
    """Main memory as far as it may be used, one for a process. Two engines share it while one replaces the other.

    `budget` is the ledger. On it are what the engines and transfers keep in main memory, and as `DEVICES` what logical
    devices in main memory may use: the most that an engine's devices may, since engines share devices. Thread-safe.
    """

    DEVICES = "devices"

    def __init__(self, limit_bytes: int) -> None:
        self.budget = DeviceBudget(host_device(limit_bytes))
        self._lock = threading.Lock()
        self._allowed: dict[DeviceBudget, int] = {}

    @property
    def limit_bytes(self) -> int:
        """All of it."""
        return self.budget.device.memory_limit_bytes

    def open(self, devices: Sequence[Device]) -> DeviceBudget:
        """The part of the ledger for an engine on `devices`. `close` it once it holds nothing."""
        part = DeviceBudget(self.budget.device, within=self.budget)
        with self._lock:
            self._allowed[part] = _in_main_memory(devices)
            self._set_devices_aside()
        return part

    def close(self, part: DeviceBudget) -> None:
        """The engine's devices are used no more. Safe to call twice."""
        with self._lock:
            self._allowed.pop(part, None)
            self._set_devices_aside()

    def room_bytes(self, devices: Sequence[Device], leaving: DeviceBudget | None = None) -> int:
        """What an engine on `devices` could keep beside them, once the engine with the part `leaving` is gone."""
        with self._lock:
            allowed = [nbytes for part, nbytes in self._allowed.items() if part is not leaving]
            free = self.budget.free_bytes + self.budget.used_by_purpose().get(self.DEVICES, 0)
        if leaving is not None:
            free += leaving.used_bytes
        return max(0, free - max([*allowed, _in_main_memory(devices)]))

    def _set_devices_aside(self) -> None:
        """As much as there is: devices may be larger than the share of main memory that is used unasked."""
        self.budget.hold(self.DEVICES, max(self._allowed.values(), default=0))


def _in_main_memory(devices: Sequence[Device]) -> int:
    return sum(device.memory_limit_bytes for device in devices if device.is_here and device.computes_on_cpu)
