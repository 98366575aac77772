"""Logical devices: what there is, how much of it may be used, and what it is doing."""

from core.devices.device import Device, DeviceBudget, DeviceKind, DeviceSpeed, format_bytes
from core.devices.discovery import Machine, PhysicalDevice, choose_devices, open_devices, probe_machine
from core.devices.readers import DeviceReader, DeviceReading
from core.devices.spec import DeviceSpec, parse_devices

__all__ = [
    "Device",
    "DeviceBudget",
    "DeviceKind",
    "DeviceReader",
    "DeviceReading",
    "DeviceSpec",
    "DeviceSpeed",
    "Machine",
    "PhysicalDevice",
    "choose_devices",
    "format_bytes",
    "open_devices",
    "parse_devices",
    "probe_machine",
]
