"""What a view has to know of the service beside its engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from core.config import Settings
from core.transfer.manager import Link, TransferStats


@dataclass(frozen=True, slots=True)
class ServiceState:
    """The service at one moment. Made by `InferencePipeline.state`.

    `ready` says whether requests would be answered, `reason` why not; `transfers` are totals since the start.
    """

    loading: bool
    closing: bool
    ready: bool
    reason: str
    settings: Settings
    transfers: Mapping[Link, TransferStats]
