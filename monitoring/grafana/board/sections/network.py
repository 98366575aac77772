"""What goes between machines."""

from __future__ import annotations

from monitoring.grafana.board import limits
from monitoring.grafana.board.panels import NOTABLE, Section, lines
from monitoring.grafana.board.queries import Query, gauge, quantile, rate

SECTION = Section(
    "Network and fast path",
    (
        lines(
            "Fast path rate",
            "Bytes per second between machines, by transport and direction. Empty without other machines.",
            Query(rate("fastpath_bytes_total", "method", "direction"), "{{method}} {{direction}} {{instance}}"),
            unit="Bps",
        ),
        lines(
            "Fast path latency",
            "p95 of each operation of each transport: a heartbeat there and back, and handing a tensor over. The alert "
            "begins at 100 ms.",
            Query(quantile(0.95, "fastpath_latency_seconds", "method", "op"), "{{op}}, {{method}} {{instance}}"),
            unit="s",
            limits=((limits.FASTPATH_LATENCY_S, NOTABLE),),
        ),
        lines(
            "Interface benchmark",
            "Latency to the machines behind each network interface, one way.",
            Query(gauge("fastpath_interface_latency_seconds"), "{{interface}} ({{kind}}) {{instance}}"),
            unit="s",
        ),
        lines(
            "Tensors between machines",
            "Tensors sent to other machines and received from them per second, by transport.",
            Query(rate("vtp_tensors_sent_total", "tier"), "sent {{tier}} {{instance}}"),
            Query(rate("vtp_tensors_recv_total", "tier"), "received {{tier}} {{instance}}"),
            unit="ops",
            width=12,
        ),
        lines(
            "Signs of life between machines",
            "Heartbeats and reports per second.",
            Query(rate("telemetry_packets_total", "direction"), "{{direction}} {{instance}}"),
            unit="pps",
            width=12,
        ),
    ),
    collapsed=True,
)
