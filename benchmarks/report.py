"""Tables for people and JSON for machines, from the measurements of ``benchmarks.run``."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.peers.base import RunResult
from benchmarks.stats import Summary, common_prefix, median_summary, speedups, summarise


@dataclass
class Series:
    """All rounds of one peer at one number of streams."""

    peer: str
    streams: int
    rounds: list[Summary] = field(default_factory=list)
    outputs: list[list[list[int]]] = field(default_factory=list)
    others_share: list[float] = field(default_factory=list)

    def add(self, result: RunResult, prompt_tokens: int, others_share: float) -> Summary:
        """Take one round in; returns its numbers."""
        summary = summarise(result, prompt_tokens)
        self.rounds.append(summary)
        self.outputs.append([request.token_ids for request in result.requests])
        self.others_share.append(others_share)
        return summary


def token_agreement(left: Series, right: Series) -> float:
    """Share of the new tokens before the first difference, over all requests; rounding makes it less than 1."""
    shares = [
        common_prefix(a, b) / max(len(a), len(b))
        for ours, theirs in zip(left.outputs, right.outputs, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    return statistics.fmean(shares)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def _rate(tokens_per_second: float) -> str:
    return f"{tokens_per_second:.1f}"


def _factor(value: float) -> str:
    return f"{value:.2f}x"


def streams_table(all_series: list[Series], streams: int, baseline: str) -> Table:
    """One table: every peer at one number of streams, medians over rounds, and how far ahead the baseline is."""
    series = [s for s in all_series if s.streams == streams and s.rounds]
    base = next((s for s in series if s.peer == baseline), None)
    title = f"{streams} stream{'s' if streams > 1 else ''}, median of {max(len(s.rounds) for s in series)} rounds"
    table = Table(title=title, title_justify="left")
    table.add_column("engine", no_wrap=True)
    for column in ("TTFT\nms", "gap ms\nmean", "gap ms\np50", "gap ms\np95"):
        table.add_column(column, justify="right")
    for column in ("decode\ntok/s", "output\ntok/s", "total\ntok/s"):
        table.add_column(column, justify="right")
    if base is not None:
        for column in ("TTFT", "gap", "decode", "output"):
            table.add_column(f"gain\n{column}", justify="right", style="bold")
        table.add_column("same\ntokens", justify="right")
    table.add_column("others", justify="right", style="dim")
    for entry in series:
        table.add_row(*_row(entry, base))
    return table


def _row(entry: Series, base: Series | None) -> list[str]:
    m = median_summary(entry.rounds)
    cells = [entry.peer, *(_milliseconds(s) for s in (m.ttft_s, m.inter_token_mean_s, m.inter_token_p50_s))]
    cells += [_milliseconds(m.inter_token_p95_s), *(_rate(r) for r in (m.decode_tok_s, m.output_tok_s, m.total_tok_s))]
    if base is not None:
        gain = speedups(base.rounds, entry.rounds)
        ratios = (gain.ttft_s, gain.inter_token_mean_s, gain.decode_tok_s, gain.output_tok_s)
        cells += [_factor(ratio) for ratio in ratios] if entry is not base else ["-"] * len(ratios)
        cells.append(f"{token_agreement(base, entry):.0%}")
    cells.append(f"{statistics.median(entry.others_share):.0%}")
    return cells


def print_machine(console: Console, machine: dict[str, Any], threads: int) -> None:
    """The lines above the tables."""
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if version)
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores ({threads} threads used), {machine['memory_gib']} GiB, "
        f"{machine['system']}, Python {machine['python']}\n{packages}",
        highlight=False,
    )


def as_json(
    all_series: list[Series], baseline: str, machine: dict[str, Any], settings: dict[str, Any], peers: dict[str, Any]
) -> dict[str, Any]:
    """Everything measured: every round, the medians, and the ratios to the baseline."""
    results = []
    for entry in all_series:
        if not entry.rounds:
            continue
        base = next((s for s in all_series if s.peer == baseline and s.streams == entry.streams), None)
        record: dict[str, Any] = {
            "peer": entry.peer,
            "streams": entry.streams,
            "median": asdict(median_summary(entry.rounds)),
            "rounds": [asdict(summary) for summary in entry.rounds],
            "others_cpu_share": entry.others_share,
        }
        if base is not None and base.rounds:
            record["baseline_better_by"] = asdict(speedups(base.rounds, entry.rounds))
            record["token_agreement"] = token_agreement(base, entry)
        results.append(record)
    return {"machine": machine, "settings": settings, "peers": peers, "baseline": baseline, "results": results}
