"""Overlapped stages beside the same placement without overlap, on emulated devices that do not match.

    python -m benchmarks.pipeline --json result.json

For each set of cards the same layers are loaded with as many steps in flight as the engine chooses and with one; what
was predicted stands beside what was measured. `benchmarks.cores` does the same on two cores of this machine.
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
from core.costs import Batch
from core.costs.cost import pipeline_s
from core.inference_pipeline import InferencePipeline
from core.placement.engine import stage_costs

SETUPS = (("3090", "5070 Ti"), ("3090", "5070 Ti", "3060"), ("3090", "5070 Ti", "3060", "2060"))
STREAMS = (1, 8, 32)
"""The numbers of streams that plans are predicted for; 8 are two for each of four stages."""


@dataclass(frozen=True)
class Result:
    """One set of cards, in the order of its stages; `sequential` is the same layers with one step at a time.
    `floor_share` is one stream's rate over the one that bytes, bandwidths and hops allow.
    """

    cards: tuple[str, ...]
    layers: tuple[int, ...]
    floor_share: float
    rates: tuple[Rate, ...]
    sequential: tuple[Rate, ...]

    def ratios(self) -> list[tuple[Rate, Rate, float]]:
        """Overlapped, sequential, and how many times faster."""
        alone = {rate.streams: rate for rate in self.sequential}
        pairs = [(rate, alone[rate.streams]) for rate in self.rates if rate.streams in alone and rate.streams > 1]
        return [(rate, other, rate.tok_s / other.tok_s) for rate, other in pairs]


def floor_tok_s(pipeline: InferencePipeline, context: int) -> float:
    """Tokens per second of one stream when every byte is read once and every hop made once."""
    plan = pipeline.engine.plan
    stages = stage_costs(plan.placement, plan.problem)
    compute, hops = pipeline_s(plan.costs, stages, plan.problem.links, Batch.decode(1, context))
    return 1 / (sum(compute) + sum(hops))


def compare(model_dir: Path, cards: tuple[str, ...], context: int, seconds: float) -> Result:
    """The same layers with and without overlap."""
    most = max(STREAMS)
    pipeline = open_pipeline(model_dir, cards, most, context)
    try:
        rates = [measure(pipeline, streams, context, seconds) for streams in STREAMS]
        share = rates[0].tok_s / floor_tok_s(pipeline, rates[0].context)
        placed = pipeline.engine.plan.placement.stages
    finally:
        pipeline.shutdown()
    order = [stage.device_index for stage in placed]
    by_hand = ",".join(str(stage.num_layers) for stage in placed)
    named = tuple(cards[index] for index in order)
    fixed: dict[str, Any] = {"engine.cohorts": 1, "devices.layers": by_hand}
    pipeline = open_pipeline(model_dir, named, most, context, **fixed)
    try:
        alone = [measure(pipeline, streams, context, seconds) for streams in STREAMS if streams > 1]
    finally:
        pipeline.shutdown()
    return Result(named, tuple(stage.num_layers for stage in placed), share, tuple(rates), tuple(alone))


def show(results: Sequence[Result], console: Console) -> None:
    """A row per set of cards and number of streams."""
    table = Table(title="decode", title_justify="left")
    for column in ("cards", "layers", "streams", "in flight", "tok/s", "one at a time", "ratio", "busy"):
        table.add_column(column, justify="left" if column == "cards" else "right")
    table.add_column("error of the prediction", justify="right")
    for result in results:
        alone = {rate.streams: rate for rate in result.sequential}
        for rate in result.rates:
            other, first = alone.get(rate.streams), rate is result.rates[0]
            ratio = "" if other is None else f"{rate.tok_s / other.tok_s:.2f}"
            table.add_row(
                " + ".join(result.cards) if first else "", ",".join(map(str, result.layers)) if first else "",
                str(rate.streams), str(rate.cohorts), f"{rate.tok_s:.2f}",
                "" if other is None else f"{other.tok_s:.2f}",
                f"{result.floor_share:.1%} of its floor" if first else ratio,
                " ".join(f"{share:.0%}" for share in rate.busy),
                f"{rate.error:+.1%}" + ("" if other is None else f", one at a time {other.error:+.1%}"),
            )  # fmt: skip
    console.print(table)


def as_dict(result: Result) -> dict[str, Any]:
    """With what follows from the fields."""
    ratios = [{"streams": rate.streams, "ratio": ratio} for rate, _, ratio in result.ratios()]
    return asdict(result) | {"ratios": ratios}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--context", type=int, default=1600, help="tokens in each prompt")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each measurement")
    parser.add_argument("--cards", type=int, choices=(2, 3, 4), help="only the set with so many cards")
    parser.add_argument("--workdir", type=Path, default=default_workdir(), help="where the model is kept")
    parser.add_argument("--json", type=Path, help="record everything measured in this file")
    given = parser.parse_args(arguments)
    model_dir = resolve_model("stages", given.workdir)
    setups = [cards for cards in SETUPS if given.cards in (None, len(cards))]
    results = [compare(model_dir, cards, given.context, given.seconds) for cards in setups]
    show(results, Console(width=180))
    if given.json is not None:
        record(given.json, "overlap", list(map(as_dict, results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
