"""What Prometheus reads of the embedding model and the reranker at a scrape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from core.embedding.engine import EncoderEngine
from core.metrics import NAMESPACE

_ROWS: tuple[tuple[type[GaugeMetricFamily | CounterMetricFamily], str, str, str], ...] = (
    (CounterMetricFamily, "embedding_inputs", "Texts, or pairs, that were computed.", "inputs"),
    (CounterMetricFamily, "embedding_tokens", "Tokens of texts that were computed.", "tokens"),
    (
        CounterMetricFamily,
        "embedding_padding_tokens",
        "Tokens computed to make texts of a batch alike.",
        "padding_tokens",
    ),
    (CounterMetricFamily, "embedding_batches", "Batches that were computed.", "batches"),
    (CounterMetricFamily, "embedding_failed_batches", "Batches that failed.", "failed_batches"),
    (CounterMetricFamily, "embedding_busy_seconds", "Time spent in forward passes.", "busy_s"),
    (GaugeMetricFamily, "embedding_queue_depth", "Texts that wait.", "waiting_inputs"),
)
"""Kind, name, help text, field of the engine's stats."""


def encoder_metrics(engines: Sequence[EncoderEngine]) -> Iterator[Metric]:
    """By model and kind. No samples where none is served."""
    for family_class, name, help_text, field in _ROWS:
        family = family_class(f"{NAMESPACE}_{name}", help_text, labels=["model", "kind"])
        for engine in engines:
            family.add_metric([engine.info.name, engine.info.kind], getattr(engine.stats, field))
        yield family
