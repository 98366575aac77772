"""What a view has to know of the service beside its engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from core.transfer.manager import Link, TransferStats


@dataclass(frozen=True, slots=True)
class ServiceState:
    """The service at one moment. Made by `InferencePipeline.state`.

    `ready` says whether requests would be answered, `reason` why not. `max_queue`, `max_batch_size` and `cache_dir` are
    settings; `transfers` are totals since the start.
    """

    loading: bool
    closing: bool
    ready: bool
    reason: str
    max_queue: int
    max_batch_size: int
    cache_dir: Path
    transfers: Mapping[Link, TransferStats]
