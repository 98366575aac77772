"""Where the model is, when it moved, and how long background work takes."""

from __future__ import annotations

from monitoring.grafana.board import limits
from monitoring.grafana.board.panels import NOTABLE, QUANTILE_COLORS, Section, lines
from monitoring.grafana.board.queries import Query, gauge, rate


def _lately(name: str, *labels: str) -> str:
    """Events are rare, so they are counted over the window of the alert."""
    by = ", ".join(("instance", *labels))
    return f"sum by ({by}) (increase({gauge(name)}[10m]))"


SECTION = Section(
    "Orchestrator and HA",
    (
        lines(
            "Placements",
            "Placements that began to serve, in 10 minutes. L1: all layers are on devices; L3: some stream in from "
            "main memory.",
            Query(_lately("orch_placements_total", "level"), "{{level}} {{instance}}"),
            unit="none",
            width=12,
        ),
        lines(
            "Migrations and rebalances",
            "In 10 minutes: layers moved to another device while the model served, and times that the server moved the "
            "model by itself. The alert begins at 3 rebalances.",
            Query(_lately("orch_migrations_total"), "migrations {{instance}}"),
            Query(_lately("orch_rebalance_total"), "rebalances {{instance}}"),
            unit="none",
            width=12,
            colors={"^migrations": "blue", "^rebalances": "orange"},
        ),
        lines(
            "Journal size",
            "Size of the journal that a standby continues from, and how often it is rotated. The alert begins at 100 "
            "MiB.",
            Query(gauge("ha_journal_size_bytes"), "{{instance}}"),
            Query(rate("ha_journal_rotations_total"), "rotations per second {{instance}}"),
            unit="bytes",
            width=12,
            limits=((limits.JOURNAL_BYTES, NOTABLE),),
            coming=True,
        ),
        lines(
            "Task percentiles",
            "Seconds that background tasks took lately, by priority and outcome.",
            Query(gauge("task_duration_percentile"), "p{{percentile}} {{priority}} {{status}} {{instance}}"),
            unit="s",
            width=12,
            colors=QUANTILE_COLORS,
        ),
    ),
    collapsed=True,
)
