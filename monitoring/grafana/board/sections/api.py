"""The HTTP API, background tasks and the process."""

from __future__ import annotations

from monitoring.grafana.board import limits
from monitoring.grafana.board.panels import BAD, NOTABLE, Section, lines, periods
from monitoring.grafana.board.queries import SERVER, Query, gauge, quantile, rate

_ANSWERS = f"sum by (instance, status) (rate({gauge('api_latency_seconds_count')}[$__rate_interval]))"

SECTION = Section(
    "API and health",
    (
        lines(
            "Endpoint latency",
            "p95 of each route, to the end of the answer, streams included. The alert begins at 5 s; it leaves out "
            "routes that answer with generated tokens or move models, which take as long as they take.",
            Query(quantile(0.95, "api_latency_seconds", "path", "method"), "{{method}} {{path}} {{instance}}"),
            unit="s",
            width=12,
            height=9,
            limits=((limits.API_LATENCY_S, NOTABLE),),
        ),
        lines(
            "Answers by status",
            "HTTP answers per second. 429: the queue is full, or a client sends too much. 503: the server is "
            "stopping, or no model is loaded.",
            Query(_ANSWERS, "{{status}} {{instance}}"),
            unit="reqps",
            width=12,
            height=9,
            stacked=True,
            colors={"^2": "green", "^3": "blue", "^4": "yellow", "^5": "red"},
        ),
        lines(
            "Task life cycle",
            "Background tasks (loading, placing, moving memory) submitted, completed, refused (for what was asked) and "
            "failed, per minute.",
            *(
                Query(f"60 * {rate(f'tasks_{what}_total')}", f"{what} {{{{instance}}}}")
                for what in ("submitted", "completed", "refused", "failed")
            ),
            unit="opm",
            colors={"^submitted": "blue", "^completed": "green", "^refused": "yellow", "^failed": "red"},
        ),
        lines(
            "Questions about the machine",
            "Requests per second for /api/system, /api/gpu and /api/nodes: dashboards and scripts.",
            Query(rate("env_endpoint_hits_total"), "{{instance}}"),
            unit="reqps",
        ),
        periods(
            "Circuit breaker",
            "Red while requests are refused because steps keep failing.",
            Query(gauge("circuit_breaker_open"), "{{instance}}"),
            steps=((None, "green"), (1, BAD)),
        ),
        periods(
            "Servers that answer",
            "Green while Prometheus can read a server's metrics, red while it cannot.",
            Query(f'up{{job="vramancer", {SERVER}}}', "{{instance}}"),
            steps=((None, BAD), (1, "green")),
        ),
        lines(
            "Main memory of the process",
            "Bytes in use.",
            Query(gauge("process_resident_memory_bytes"), "{{instance}}"),
            unit="bytes",
        ),
        lines(
            "Processor of the process",
            "Cores in use.",
            Query(rate("process_cpu_seconds_total"), "{{instance}}"),
            unit="none",
        ),
    ),
)
