"""Logical devices: what there is, how much of it may be used, and what it is doing."""

from core.devices.device import (
    HOST,
    Device,
    DeviceBudget,
    LinkSpeed,
    MainMemory,
    format_bytes,
    host_device,
    host_of,
    machine_of,
    wait_until,
)
from core.devices.discovery import left_out, open_devices, open_main_memory
from core.devices.probe import Machine, probe_machine
from core.devices.readers import DeviceReader
from core.devices.spec import parse_devices, parse_link

__all__ = [
    "HOST",
    "Device",
    "DeviceBudget",
    "DeviceReader",
    "LinkSpeed",
    "Machine",
    "MainMemory",
    "format_bytes",
    "host_device",
    "host_of",
    "left_out",
    "machine_of",
    "open_devices",
    "open_main_memory",
    "parse_devices",
    "parse_link",
    "probe_machine",
    "wait_until",
]
