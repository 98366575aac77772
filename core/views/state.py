"""What a view has to know of the service beside its engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from core.config import Settings
from core.devices.readings import DeviceReading
from core.metrics import Percentiles
from core.transfer.manager import Link, TransferStats


@dataclass(frozen=True, slots=True)
class ServiceState:
    """The service at one moment. Made by `InferencePipeline.state`.

    `ready` says whether requests would be answered, `reason` why not; `transfers` are totals since the start,
    `latency` is of late, `readings` are the last ones of devices.
    """

    loading: bool
    closing: bool
    ready: bool
    reason: str
    settings: Settings
    transfers: Mapping[Link, TransferStats]
    latency: Mapping[str, Percentiles] = field(default_factory=dict)
    readings: Mapping[str, DeviceReading] = field(default_factory=dict)
