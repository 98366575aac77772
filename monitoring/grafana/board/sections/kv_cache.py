"""The paged KV cache and the batch."""

from __future__ import annotations

from monitoring.grafana.board.panels import Section, lines
from monitoring.grafana.board.queries import Query, gauge, rate

_DEVICE = "{{device}} {{instance}}"

SECTION = Section(
    "KV cache and batch",
    (
        lines(
            "KV cache in use",
            "Share of the pages that requests use. Cached pages that nobody uses count as free.",
            Query(gauge("kv_cache_usage_ratio"), "{{instance}}"),
            unit="percentunit",
            top=1,
            limits=((0.9, "orange"),),
        ),
        lines(
            "Pages of each device",
            "KV pages in use and free, and pages that are borrowed from other devices.",
            Query(gauge("paged_kv_used_pages"), f"used {_DEVICE}"),
            Query(gauge("paged_kv_free_pages"), f"free {_DEVICE}"),
            Query(gauge("paged_kv_borrowed_pages"), "borrowed {{instance}}"),
            unit="short",
            colors={"^used": "blue", "^free": "green", "^borrowed": "orange"},
            leads_to="Leases",
        ),
        lines(
            "Batch and queue",
            "Sequences in the last step, and sequences that wait.",
            Query(gauge("batcher_batch_size"), "batch {{instance}}"),
            Query(gauge("batcher_queue_depth"), "queue {{instance}}"),
            unit="none",
            colors={"^batch": "blue", "^queue": "orange"},
        ),
        lines(
            "Preemptions",
            "Sequences per second that were put back to make room, and are computed again. More than now and then "
            "means that the KV cache is too small for so many requests.",
            Query(rate("preemptions_total"), "{{instance}}"),
            unit="ops",
            width=12,
        ),
        lines(
            "Cached pages given up",
            "Cached pages per second that made room for new ones.",
            Query(rate("kv_cache_evictions_total"), "{{instance}}"),
            unit="ops",
            width=12,
            leads_to="Demotions",
        ),
    ),
)
