"""What a view has to know of the service beside its engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from core.cluster.master import Master
from core.config import Settings
from core.devices.readings import DeviceReading
from core.embedding.engine import EncoderEngine
from core.engine.growth import Offer
from core.metrics import Percentiles
from core.transfer.manager import Link, TransferStats
from core.upstreams.group import GroupView


@dataclass(frozen=True, slots=True)
class ServiceState:
    """The service at one moment. Made by `InferencePipeline.state`.

    `ready` says whether requests would be answered, `reason` why not; `transfers` are totals since the start,
    `latency` computes what is of late, `readings` are the last ones of devices. `cluster` has the nodes, `offer` says
    what they would be good for. `upstreams` are models that other servers answer for, `encoders` the embedding model
    and the reranker.
    """

    loading: bool
    closing: bool
    ready: bool
    reason: str
    settings: Settings
    transfers: Mapping[Link, TransferStats]
    latency: Callable[[], Mapping[str, Percentiles]] = dict
    readings: Mapping[str, DeviceReading] = field(default_factory=dict)
    cluster: Master | None = None
    offer: Offer | None = None
    upstreams: tuple[GroupView, ...] = ()
    encoders: tuple[EncoderEngine, ...] = ()
