"""Inference overview: what clients get."""

from __future__ import annotations

from monitoring.grafana.board import limits
from monitoring.grafana.board.panels import BAD, NOTABLE, QUANTILE_COLORS, Section, lines, spread
from monitoring.grafana.board.queries import Query, buckets, gauge, quantiles, rate

SECTION = Section(
    "Inference overview",
    (
        lines(
            "Throughput",
            "Tokens per second: generated ones, and prompt tokens beside them.",
            Query(rate("generation_tokens_total"), "generated {{instance}}"),
            Query(rate("prompt_tokens_total"), "prompt {{instance}}"),
            unit="suffix: tok/s",
            colors={"^generated": "blue", "^prompt": "purple"},
        ),
        lines(
            "Request latency",
            "From submission to the last token. Alerts begin at a p95 of 10 s and a p99 of 30 s. A long answer takes "
            "long: compare with the time to first token and between tokens.",
            *quantiles("infer_latency_seconds"),
            unit="s",
            colors=QUANTILE_COLORS,
            limits=((limits.LATENCY_P95_S, NOTABLE), (limits.LATENCY_P99_S, BAD)),
            leads_to="Where a request's time goes",
        ),
        lines(
            "Error rate",
            "Share of requests that end in an error of the server. The alert begins at 5 %.",
            Query(f"{rate('infer_errors_total')} / ({rate('infer_total')} > 0)", "{{instance}}"),
            unit="percentunit",
            colors={".": "red"},
            limits=((limits.ERROR_SHARE, BAD),),
            leads_to="How requests end",
        ),
        lines(
            "Active tasks",
            "Requests that are being generated and that wait, and background tasks (loading, placing, moving memory). "
            "The alert begins when more than 16 background tasks run.",
            Query(gauge("requests_running"), "running {{instance}}"),
            Query(gauge("requests_waiting"), "waiting {{instance}}"),
            Query(gauge("tasks_running"), "background {{instance}}"),
            unit="none",
            colors={"^running": "green", "^waiting": "orange", "^background": "purple"},
            leads_to="Task life cycle",
        ),
        lines(
            "Request rate",
            "Requests that end per second, and those of them that their clients gave up.",
            Query(rate("infer_total"), "ended {{instance}}"),
            Query(rate("requests_aborted_total"), "given up {{instance}}"),
            unit="reqps",
            colors={"^ended": "blue", "^given up": "orange"},
            leads_to="How requests end",
        ),
        spread(
            "Latency distribution",
            "How many requests took how long, all servers together. A second band above the first is a second kind of "
            "request, or a queue.",
            buckets("infer_latency_seconds"),
            unit="s",
        ),
    ),
)
