"""`profiled` beside `vram` and an even split, on emulated pairs of cards that do not match.

    python -m benchmarks.placement --json result.json

Each strategy places the same model over the same two devices, and what comes of it is measured: one stream, planned for
latency, and eight, planned for throughput. In some pairs the model needs both cards; in others it would fit on the
first alone, and using the second may cost more than it brings.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.emulated import Rate, measure, open_pipeline, record
from benchmarks.models import default_workdir, resolve_model

PAIRS = (
    (("3090", "5070 Ti"), 1.5), (("3090", "2060"), 2.8), (("4090", "3060"), 1.6), (("A100", "3060"), 2.4),
    (("3090", "host"), 1.5),
)  # fmt: skip
"""And how much more memory they have together than the model and its KV need; half of it fits on either."""
STRATEGIES = ("profiled", "vram", "balanced")
LOADS = ((1, "latency"), (8, "throughput"))


@dataclass(frozen=True)
class Outcome:
    """One strategy: layers on each card, in the order of the cards, 0 where it is left out; and what was measured."""

    strategy: str
    layers: tuple[int, ...]
    rate: Rate


@dataclass(frozen=True)
class Result:
    """One pair of cards with one load."""

    cards: tuple[str, ...]
    streams: int
    objective: str
    outcomes: tuple[Outcome, ...]

    def ratio(self, strategy: str) -> float:
        """How many times as fast as this strategy `profiled` is."""
        rates = {outcome.strategy: outcome.rate.tok_s for outcome in self.outcomes}
        return rates["profiled"] / rates[strategy]


def compare(
    model_dir: Path, cards: tuple[str, ...], slack: float, streams: int, objective: str, *, context: int, seconds: float
) -> Result:
    """All strategies on one pair."""
    outcomes = []
    for strategy in STRATEGIES:
        settings = {"devices.placement": strategy, "devices.objective": objective}
        pipeline = open_pipeline(model_dir, cards, streams, context, slack=slack, **settings)
        try:
            placed = {stage.device_index: stage.num_layers for stage in pipeline.engine.plan.placement.stages}
            layers = tuple(placed.get(index, 0) for index in range(len(cards)))
            outcomes.append(Outcome(strategy, layers, measure(pipeline, streams, context, seconds)))
        finally:
            pipeline.shutdown()
    return Result(cards, streams, objective, tuple(outcomes))


def show(results: Sequence[Result], console: Console) -> None:
    """A row per pair and load."""
    table = Table(title="decode, tok/s (layers on each card)", title_justify="left")
    table.add_column("cards")
    for column in ("streams", *STRATEGIES, "profiled / vram", "profiled / balanced", "error of the prediction"):
        table.add_column(column, justify="right")
    for result in results:
        cells = [f"{o.rate.tok_s:.2f} ({','.join(map(str, o.layers))})" for o in result.outcomes]
        errors = " ".join(f"{outcome.rate.error:+.1%}" for outcome in result.outcomes)
        ratios = [f"{result.ratio(strategy):.2f}" for strategy in STRATEGIES[1:]]
        table.add_row(" + ".join(result.cards), str(result.streams), *cells, *ratios, errors)
    console.print(table)


def as_dict(result: Result) -> dict[str, Any]:
    """With what follows from the fields."""
    return asdict(result) | {"ratios": {strategy: result.ratio(strategy) for strategy in STRATEGIES[1:]}}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.placement", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--context", type=int, default=1600, help="tokens in each prompt")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of each measurement")
    parser.add_argument("--pair", type=int, choices=range(1, len(PAIRS) + 1), help="only this pair, by its number")
    parser.add_argument("--workdir", type=Path, default=default_workdir(), help="where the model is kept")
    parser.add_argument("--json", type=Path, help="record everything measured in this file")
    given = parser.parse_args(arguments)
    model_dir = resolve_model("stages", given.workdir)
    pairs = PAIRS if given.pair is None else (PAIRS[given.pair - 1],)
    results = [
        compare(model_dir, cards, slack, streams, objective, context=given.context, seconds=given.seconds)
        for cards, slack in pairs
        for streams, objective in LOADS
    ]
    show(results, Console(width=180))
    if given.json is not None:
        record(given.json, "placement", list(map(as_dict, results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
