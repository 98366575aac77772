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
            "Bytes per second between machines, by transport and direction.",
            Query(rate("fastpath_bytes_total", "method", "direction"), "{{method}} {{direction}} {{instance}}"),
            unit="Bps",
            coming=True,
        ),
        lines(
            "Fast path latency",
            "p95 of each operation of each transport. The alert begins at 100 ms.",
            Query(quantile(0.95, "fastpath_latency_seconds", "method", "op"), "{{op}}, {{method}} {{instance}}"),
            unit="s",
            limits=((limits.FASTPATH_LATENCY_S, NOTABLE),),
            coming=True,
        ),
        lines(
            "Interface benchmark",
            "Latency that was measured on each network interface.",
            Query(gauge("fastpath_interface_latency_seconds"), "{{interface}} ({{kind}}) {{instance}}"),
            unit="s",
            coming=True,
        ),
        lines(
            "Tensors between machines",
            "Tensors sent and received per second, by the tier that they belong to.",
            Query(rate("vtp_tensors_sent_total", "tier"), "sent {{tier}} {{instance}}"),
            Query(rate("vtp_tensors_recv_total", "tier"), "received {{tier}} {{instance}}"),
            unit="ops",
            width=12,
            coming=True,
        ),
        lines(
            "Announcements between machines",
            "Packets per second in which machines tell each other how they are.",
            Query(rate("telemetry_packets_total", "direction"), "{{direction}} {{instance}}"),
            unit="pps",
            width=12,
            coming=True,
        ),
    ),
    collapsed=True,
)
