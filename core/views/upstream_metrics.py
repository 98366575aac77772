"""What Prometheus reads of other servers that answer for models, at a scrape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from core.metrics import NAMESPACE
from core.upstreams.group import Group

_LABELS = ["model", "replica"]


def upstream_metrics(groups: Sequence[Group]) -> Iterator[Metric]:
    """Since each replica was named. No samples where there is none."""
    calls = CounterMetricFamily(
        f"{NAMESPACE}_upstream_requests", "Requests that were sent to a replica, by how they ended.",
        labels=[*_LABELS, "outcome"],
    )  # fmt: skip
    moved = CounterMetricFamily(
        f"{NAMESPACE}_upstream_failovers", "Requests that a replica failed to answer, so that others were asked.",
        labels=["model"],
    )  # fmt: skip
    in_flight = GaugeMetricFamily(
        f"{NAMESPACE}_upstream_requests_running", "Requests under way at a replica.", labels=_LABELS
    )
    reachable = GaugeMetricFamily(
        f"{NAMESPACE}_upstream_up", "Whether a replica was there when it was looked at last.", labels=_LABELS
    )
    is_open = GaugeMetricFamily(
        f"{NAMESPACE}_upstream_breaker_open", "Whether a replica is not asked, since it failed.", labels=_LABELS
    )
    for group in groups:
        moved.add_metric([group.name], group.moved)
        for replica in group.replicas:
            view, labels = replica.view(), [group.name, replica.name]
            for outcome, count in view.calls.items():
                calls.add_metric([*labels, outcome], count)
            in_flight.add_metric(labels, view.in_flight)
            is_open.add_metric(labels, float(view.breaker == "open"))
            if view.reachable is not None:
                reachable.add_metric(labels, float(view.reachable))
    yield from (calls, moved, in_flight, reachable, is_open)
