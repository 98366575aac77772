"""PromQL that panels share. Metrics are named without their prefix. Servers are kept apart by `instance` everywhere."""

from __future__ import annotations

from dataclasses import dataclass

PREFIX = "vramancer_"
SERVER = 'instance=~"$instance"'
"""The servers that are chosen at the top of the board."""
CARD = f'{SERVER}, gpu=~"$gpu"'
"""Their devices that are chosen there."""
WINDOW = "$__rate_interval"


@dataclass(frozen=True, slots=True)
class Query:
    """One line of a panel, or several; `legend` names them by labels. Exemplars lead to single requests."""

    expr: str
    legend: str
    exemplars: bool = False


def gauge(name: str, where: str = SERVER) -> str:
    return f"{PREFIX}{name}{{{where}}}"


def rate(name: str, *labels: str) -> str:
    """Of a counter, per second, summed over the labels that are not named."""
    return f"sum by ({_by(labels)}) (rate({gauge(name)}[{WINDOW}]))"


def quantile(share: float, name: str, *labels: str) -> str:
    """Of a histogram, over the last moments."""
    return f"histogram_quantile({share}, {rate(f'{name}_bucket', *labels, 'le')})"


def mean(name: str, *labels: str) -> str:
    """Of a histogram, over the last moments."""
    return f"{rate(f'{name}_sum', *labels)} / ({rate(f'{name}_count', *labels)} > 0)"


def quantiles(name: str, *labels: str, of: str = "{{instance}}") -> tuple[Query, ...]:
    """p50, p95 and p99 of a histogram."""
    return tuple(
        Query(quantile(percent / 100, name, *labels), f"p{percent} {of}", exemplars=percent == 99)
        for percent in (50, 95, 99)
    )


def buckets(name: str) -> Query:
    """How many observations fell into each bucket, for a heatmap; all servers together."""
    return Query(f"sum by (le) (increase({gauge(f'{name}_bucket')}[{WINDOW}]))", "{{le}}", exemplars=True)


def _by(labels: tuple[str, ...]) -> str:
    return ", ".join(("instance", *labels))
