"""How much memory is free at this moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core.devices.device import Device
from core.devices.probe import Machine, probe_cpu, probe_machine


@dataclass(frozen=True, slots=True)
class MemoryNow:
    """Memory of a logical device's physical device at this moment, other processes' use included.

    `limit_bytes` is what a plan may use of it. Parts of one device share `free_bytes`.
    """

    device: str
    product: str
    total_bytes: int
    free_bytes: int
    limit_bytes: int

    @property
    def usable_bytes(self) -> int:
        """What could really be allocated now, within the limit."""
        return min(self.free_bytes, self.limit_bytes)


def read_memory(devices: Sequence[Device], machine: Machine | None = None) -> tuple[MemoryNow, ...]:
    """Free memory as it is, one entry per device; `machine` is probed now unless given."""
    machine = machine or probe_machine()
    physical = {found.torch_device: found for found in (machine.cpu, *machine.gpus)}
    return tuple(
        MemoryNow(device.name, found.product, found.total_bytes, found.free_bytes, device.memory_limit_bytes)
        for device in devices
        for found in (physical[device.torch_device],)
    )


def free_bytes_of(device: Device) -> int:
    """Free memory of a logical device's physical device now, other processes' use included. Asks that device alone, in
    well under a millisecond, and may be called while a model serves: a machine is probed at the start only."""
    if device.computes_on_cpu:
        return probe_cpu().free_bytes
    import torch

    if device.is_mps:
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return torch.cuda.mem_get_info(device.torch_device)[0]
