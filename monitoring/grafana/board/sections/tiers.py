"""KV blocks in main memory, on other nodes, on disk and in remote storage."""

from __future__ import annotations

from monitoring.grafana.board import limits
from monitoring.grafana.board.panels import BAD, Section, lines
from monitoring.grafana.board.queries import SERVER, Query, gauge, rate

_TIER = "{{tier}} {{instance}}"
_MOVE = "{{from}} to {{to}} {{instance}}"
_COLORS = {
    "^L1": "green", "^L2": "blue", "^L3": "purple", "^L4": "yellow", "^L5": "orange", "^L6": "red",
}  # fmt: skip


def _hotness(share: float) -> Query:
    spread = f"sum by (instance, tier, le) ({gauge('block_hotness_bucket', SERVER)})"
    return Query(f"histogram_quantile({share}, {spread})", f"{_TIER} p{share * 100:.0f}")


SECTION = Section(
    "Memory tiering",
    (
        lines(
            "Promotions",
            "KV blocks per second that come to a nearer tier because they are needed.",
            Query(rate("memory_promotions_total", "from", "to"), _MOVE),
            unit="ops",
        ),
        lines(
            "Demotions",
            "KV blocks per second that a farther tier keeps.",
            Query(rate("memory_demotions_total", "from", "to"), _MOVE),
            unit="ops",
        ),
        lines(
            "Evictions",
            "KV blocks per second that no tier keeps: they have to be computed again. The alert begins at 10.",
            Query(rate("memory_evictions_total", "from", "to"), _MOVE),
            unit="ops",
            limits=((limits.EVICTIONS_PER_S, BAD),),
        ),
        lines(
            "Hotness of blocks",
            "How hot the blocks of each tier are: the median one, and the hottest of 20. 1 is one use just now. Nearer "
            "tiers should be hotter.",
            _hotness(0.5),
            _hotness(0.95),
            unit="none",
            colors=_COLORS,
        ),
        lines(
            "Hierarchy moves",
            "Blocks per second that come to each tier.",
            Query(rate("orch_hierarchy_moves_total", "to_level"), "{{to_level}} {{instance}}"),
            unit="ops",
            colors=_COLORS,
        ),
        lines(
            "How full the tiers are",
            "Share of what each tier may hold.",
            Query(f"{gauge('memory_tier_used_bytes')} / ({gauge('memory_tier_capacity_bytes')} > 0)", _TIER),
            unit="percentunit",
            top=1,
            colors=_COLORS,
        ),
        lines(
            "Blocks in each tier",
            "KV blocks.",
            Query(gauge("memory_tier_blocks"), _TIER),
            unit="short",
            colors=_COLORS,
        ),
        lines(
            "Found in each tier",
            "Share of the blocks looked up in a tier that it had.",
            Query(
                f"{rate('memory_tier_hits_total', 'tier')} / "
                f"({rate('memory_tier_hits_total', 'tier')} + {rate('memory_tier_misses_total', 'tier')} > 0)",
                _TIER,
            ),
            unit="percentunit",
            top=1,
            colors=_COLORS,
        ),
        lines(
            "Writes given up",
            "Blocks per second that were dropped because writing them down was too slow.",
            Query(rate("memory_dropped_writes_total"), "{{instance}}"),
            unit="ops",
        ),
    ),
    collapsed=True,
)
