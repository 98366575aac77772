"""Memory that devices lend each other."""

from __future__ import annotations

from monitoring.grafana.board.panels import Section, lines
from monitoring.grafana.board.queries import Query, gauge, rate

SECTION = Section(
    "Lending",
    (
        lines(
            "Leases",
            "Leases that are not released.",
            Query(gauge("lending_active_leases"), "{{instance}}"),
            unit="none",
            width=6,
        ),
        lines(
            "Who borrows from whom",
            "Leases granted per second.",
            Query(rate("lending_borrows_total", "borrower", "lender"), "{{borrower}} from {{lender}} {{instance}}"),
            unit="ops",
            width=6,
        ),
        lines(
            "Memory asked back",
            "Times per second that a lender needed its memory again, by urgency.",
            Query(rate("lending_reclaims_total", "urgency"), "{{urgency}} {{instance}}"),
            unit="ops",
            width=6,
            stacked=True,
            colors={"^low": "green", "^medium": "yellow", "^high": "orange", "^critical": "red"},
        ),
        lines(
            "Memory that can be lent",
            "Bytes that are lent or can be.",
            Query(f"{gauge('lending_pool_capacity_gb')} * 1e9", "{{instance}}"),
            unit="decbytes",
            width=6,
        ),
        lines(
            "Bytes lent",
            "Bytes lent per second, however long.",
            Query(rate("lending_bytes_lent_total"), "{{instance}}"),
            unit="Bps",
            width=24,
            height=6,
        ),
    ),
    collapsed=True,
)
