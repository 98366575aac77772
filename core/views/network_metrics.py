"""What Prometheus reads of the links to other machines at a scrape."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from core.cluster.master import Master
from core.metrics import NAMESPACE
from core.network.traffic import LinkStats

TRANSPORT = "tcp"
"""Of every link; large payloads may go by RDMA beside it."""

_TENSORS = (
    ("vtp_tensors_sent", "Tensors sent to other machines.", "sent_tensors"),
    ("vtp_tensors_recv", "Tensors received from other machines.", "received_tensors"),
    ("vtp_bytes_sent", "Bytes of tensors sent to other machines.", "sent_tensor_bytes"),
)
"""Name, help text, field."""
_SENT_RECEIVED = ("sent", "received")
_DIRECTIONS = (
    ("telemetry_packets", "Heartbeats and reports between machines.", ("sent_signs", "received_signs")),
    ("vtp_kv_cache_ops", "Blocks of KV, or parts of them, between machines.", ("sent_blocks", "received_blocks")),
    (
        "vtp_attention_queries",
        "Queries for attention over KV that one machine lends another, one for each layer and lender of a step.",
        ("sent_queries", "received_queries"),
    ),
)
"""Name, help text, fields of what was sent and what was received."""


def network_metrics(cluster: Master | None) -> Iterator[Metric]:
    """Since the server started, nodes that have gone included. No samples where no machines may join."""
    stats = cluster.traffic() if cluster is not None else None
    yield _bytes_moved(stats)
    for name, help_text, fields in _DIRECTIONS:
        family = CounterMetricFamily(f"{NAMESPACE}_{name}", help_text, labels=["direction"])
        for direction, field in zip(_SENT_RECEIVED, fields, strict=True):
            _add(family, [direction], stats, field)
        yield family
    for name, help_text, field in _TENSORS:
        family = CounterMetricFamily(f"{NAMESPACE}_{name}", help_text, labels=["tier"])
        _add(family, [TRANSPORT], stats, field)
        yield family
    if stats is not None and stats.sent_gpudirect:  # absent where there is none
        yield CounterMetricFamily(
            f"{NAMESPACE}_vtp_gpudirect_ops", "Tensors from a GPU to a network card, past main memory.",
            value=stats.sent_gpudirect,
        )  # fmt: skip
    yield _interfaces(cluster)


def _bytes_moved(stats: LinkStats | None) -> Metric:
    """By the way that they took; RDMA has samples once something has gone by it."""
    name = f"{NAMESPACE}_fastpath_bytes"
    family = CounterMetricFamily(name, "Payload bytes between machines.", labels=["method", "direction"])
    for direction in _SENT_RECEIVED if stats is not None else ():
        by_rdma = getattr(stats, f"{direction}_rdma_bytes")
        family.add_metric([TRANSPORT, direction], getattr(stats, f"{direction}_bytes") - by_rdma)
        if by_rdma:
            family.add_metric(["rdma", direction], by_rdma)
    return family


def _add(family: CounterMetricFamily, labels: list[str], stats: LinkStats | None, field: str) -> None:
    if stats is not None:
        family.add_metric(labels, getattr(stats, field))


def _interfaces(cluster: Master | None) -> Metric:
    """Nodes that are reached by the same interface count together."""
    help_text = "Latency to the machines behind a network interface, one way: the median of their last heartbeats."
    family = GaugeMetricFamily(
        f"{NAMESPACE}_fastpath_interface_latency_seconds", help_text, labels=["interface", "kind"]
    )
    behind: dict[tuple[str, str], list[float]] = {}
    for node in cluster.nodes if cluster is not None else ():
        behind.setdefault((node.interface.name, node.interface.kind), []).append(node.latency_s)
    for labels, latencies in behind.items():
        family.add_metric(labels, statistics.median(latencies))
    return family
