"""The machines that serve together: `/api/nodes`."""

from __future__ import annotations

import platform
import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from core.cluster.master import LeftOut, Master
from core.cluster.node import Node
from core.engine.growth import Offer
from core.engine.model_engine import ModelEngine
from core.profiling.profile_store import cpu_name
from core.views.devices import DeviceView, device_views
from core.views.state import ServiceState


@dataclass(frozen=True, slots=True)
class LinkView:
    """The master's link to a node: half of what the last heartbeat took there and back, and bytes a second, as they
    were measured when the node joined. `interface` is the one that leads there, `kind` what that is. `encrypted`: by
    TLS, as all links of the cluster are then."""

    latency_s: float
    bytes_per_second: float
    interface: str
    kind: str
    encrypted: bool


@dataclass(frozen=True, slots=True)
class NodeView:
    """A machine. `hostname` is its name in the cluster. `status`: a node that is leaving computes until its layers are
    elsewhere. `link` is None for the machine that answers, and `address` where it has no cluster."""

    id: str
    hostname: str
    roles: tuple[str, ...]
    status: Literal["joined", "leaving"]
    address: str | None
    link: LinkView | None
    version: str | None
    python: str
    torch: str
    system: str
    processor: str
    devices: tuple[DeviceView, ...]
    layers: Mapping[str, tuple[int, int]]
    """First and last layer by device, of those that have some."""
    lends_bytes: int = 0
    """Main memory that it offers to blocks of KV (L4), and what of it they take."""
    lent_bytes: int = 0


@dataclass(frozen=True, slots=True)
class DiscoveryView:
    """Whether workers are accepted, and find the master by themselves."""

    status: Literal["disabled", "advertised", "unavailable"]
    address: str | None = None
    port: int | None = None


@dataclass(frozen=True, slots=True)
class NodesView:
    """`left_out` are machines that were refused, and why. `offer` says what all nodes together would do, if that is
    faster than what is placed."""

    nodes: tuple[NodeView, ...]
    left_out: tuple[LeftOut, ...]
    discovery: DiscoveryView
    offer: Offer | None


def nodes_view(engine: ModelEngine | None, service: ServiceState) -> NodesView:
    """The machine that answers comes first."""
    cluster, layers = service.cluster, _layers(engine)
    devices = device_views(engine, service)
    here = _own(cluster, tuple(device for device in devices if "/" not in device.name), layers)
    if cluster is None:
        return NodesView((here,), (), DiscoveryView("disabled"), None)
    known = {device.name: device for device in devices}
    others = tuple(_other(node, known, layers, encrypted=cluster.tls) for node in cluster.nodes)
    host, port = cluster.address
    found = DiscoveryView("advertised" if cluster.is_found else "unavailable", host, port)
    return NodesView((here, *others), cluster.left_out, found, service.offer)


def _layers(engine: ModelEngine | None) -> dict[str, tuple[int, int]]:
    stages = engine.plan.placement.stages if engine is not None else ()
    return {stage.device_name: (stage.first_layer, stage.last_layer - 1) for stage in stages}


def _own(cluster: Master | None, devices: tuple[DeviceView, ...], layers: Mapping[str, tuple[int, int]]) -> NodeView:
    hostname = socket.gethostname()
    known = str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{uuid.getnode():012x}.{hostname}"))
    return NodeView(
        id=known,
        hostname=hostname if cluster is None else cluster.name,
        roles=("api", "engine") if cluster is None else ("api", "engine", "master"),
        status="joined",
        address=None if cluster is None else cluster.address[0],
        link=None,
        version=None if cluster is None else cluster.version,
        python=platform.python_version(),
        torch=str(torch.__version__),
        system=f"{platform.system()} {platform.machine()}",
        processor=cpu_name(),
        devices=devices,
        layers=_of(devices, layers),
    )


def _other(
    node: Node, known: Mapping[str, DeviceView], layers: Mapping[str, tuple[int, int]], *, encrypted: bool
) -> NodeView:
    """`known` are devices that the model was given, with what is on them."""
    info = node.info
    devices = tuple(
        known.get(name) or DeviceView(name, -1, each.kind, each.limit_bytes, 0, {}, 0, node.readings.get(name))
        for name, each in node.devices.items()
    )
    return NodeView(
        id=node.id,
        hostname=node.name,
        roles=("worker",),
        status="leaving" if node.leaving else "joined",
        address=node.address,
        link=LinkView(
            node.latency_s, node.speed.bandwidth_bytes_s, node.interface.name, node.interface.kind, encrypted
        ),
        version=info.version,
        python=info.python,
        torch=info.torch,
        system=info.system,
        processor=info.processor,
        devices=devices,
        layers=_of(devices, layers),
        lends_bytes=info.lends_bytes,
        lent_bytes=node.lent_bytes,
    )


def _of(devices: tuple[DeviceView, ...], layers: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {device.name: layers[device.name] for device in devices if device.name in layers}
