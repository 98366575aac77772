"""What each way to keep the weights comes to, for people: a row a kind, the chosen one first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from core.engine.best_fit import Verdict


def print_fit(verdicts: Sequence[Verdict], console: Console) -> None:
    """No line needs more than the console's width."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("weights", overflow="fold")
    table.add_column("fits", no_wrap=True)
    for column in ("tokens of KV", "tok/s, 1 stream"):
        table.add_column(column, justify="right", no_wrap=True)
    for verdict in verdicts:
        speed = verdict.tok_s
        table.add_row(
            verdict.title, _fits(verdict), f"{verdict.shown.pooled.tokens:,}" if verdict.shown is not None else "-",
            "-" if speed is None else f"{speed:.1f}", style="bold" if verdict is verdicts[0] else None,
        )  # fmt: skip
    console.print(table)
    for verdict in verdicts:
        if verdict.reason:
            console.print(f"{verdict.title}: {verdict.reason}", style="dim", highlight=False)
    chosen = verdicts[0]
    if chosen.quantize != "none":
        console.print(f"Serve it with --quantize {chosen.quantize}.", highlight=False)
    console.print()


def _fits(verdict: Verdict) -> str:
    if verdict.shown is None:
        return "no"
    layers = verdict.shown.problem.costs.num_layers
    return "yes" if verdict.fits else f"{verdict.streamed_layers} of {layers} layers stream"
