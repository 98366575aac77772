"""Overlapped stages beside the same placement without overlap, on emulated devices that do not match.

    python -m benchmarks.pipeline --json result.json

For each set of cards the same layers are loaded with as many steps in flight as the engine chooses and with one; what
was predicted stands beside what was measured. `--real` does the same on two cores of this machine, nothing emulated.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.emulated import NEW_TOKENS, Rate, measure, open_pipeline, record
from benchmarks.machine import LoadMeter, wait_until_quiet
from benchmarks.models import SHAPES, default_workdir, resolve_model
from core.config import load_settings
from core.inference_pipeline import InferencePipeline
from core.placement import Batch, pipeline_s
from core.placement.engine import stage_costs

_PATIENCE_S = 120.0
SETUPS = (("3090", "5070 Ti"), ("3090", "5070 Ti", "3060"), ("3090", "5070 Ti", "3060", "2060"))
STREAMS = (1, 8, 32)
"""The numbers of streams that plans are predicted for; 8 are two for each of four stages."""


@dataclass(frozen=True)
class Result:
    """One set of cards, in the order of its stages; `sequential` is the same layers with one step at a time.
    `floor_share` is one stream's rate over the one that bytes, bandwidths and hops allow. `others` is the share of the
    machine that other processes took meanwhile, where nothing is emulated.
    """

    cards: tuple[str, ...]
    layers: tuple[int, ...]
    floor_share: float
    rates: tuple[Rate, ...]
    sequential: tuple[Rate, ...]
    others: float = 0.0

    def ratios(self) -> list[tuple[Rate, Rate, float]]:
        """Overlapped, sequential, and how many times faster."""
        alone = {rate.streams: rate for rate in self.sequential}
        pairs = [(rate, alone[rate.streams]) for rate in self.rates if rate.streams in alone and rate.streams > 1]
        return [(rate, other, rate.tok_s / other.tok_s) for rate, other in pairs]


def floor_tok_s(pipeline: InferencePipeline, context: int) -> float:
    """Tokens per second of one stream when every byte is read once and every hop made once."""
    plan = pipeline.engine.plan
    stages = stage_costs(plan.placement, plan.request)
    compute, hops = pipeline_s(plan.costs, stages, plan.request.links, Batch.decode(1, context))
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
    fixed = {"engine.cohorts": 1, "devices.layers": by_hand}
    pipeline = open_pipeline(model_dir, named, most, context, **fixed)
    try:
        alone = [measure(pipeline, streams, context, seconds) for streams in STREAMS if streams > 1]
    finally:
        pipeline.shutdown()
    return Result(named, tuple(stage.num_layers for stage in placed), share, tuple(rates), tuple(alone))


def compare_real(model_dir: Path, context: int, seconds: float) -> Result:
    """Two parts of this machine's CPU with one core each: nothing is emulated."""
    most, vocab = max(STREAMS), SHAPES["443m"].vocab
    settings: dict[str, Any] = {
        "model.name": str(model_dir), "devices.devices": "cpu=4GiB,cpu=4GiB", "devices.cpu_threads": 1,
        "devices.layers": "11,11", "devices.plan_streams": most, "devices.plan_context": context,
        "engine.max_batch_size": most, "engine.kv_cache_tokens": most * (context + NEW_TOKENS),
    }  # fmt: skip
    rates = []
    wait_until_quiet(_PATIENCE_S)
    meter, begun_s = LoadMeter(), _own_cpu_s()
    for fixed in ({}, {"engine.cohorts": 1}):
        pipeline = InferencePipeline(load_settings(overrides=settings | fixed))
        pipeline.load()
        try:
            rates.append(tuple(measure(pipeline, count, context, seconds, vocab=vocab) for count in STREAMS))
        finally:
            pipeline.shutdown()
    return Result(("cpu", "cpu"), (11, 11), math.nan, *rates, others=meter.others_share(_own_cpu_s() - begun_s))


def _own_cpu_s() -> float:
    times = psutil.Process().cpu_times()
    return times.user + times.system


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
                f"{result.floor_share:.1%} of its floor" if first and not math.isnan(result.floor_share) else ratio,
                " ".join(f"{share:.0%}" for share in rate.busy),
                f"{rate.error:+.1%}" + ("" if other is None else f", one at a time {other.error:+.1%}"),
            )  # fmt: skip
    console.print(table)
    for result in results:
        if result.others:
            console.print(f"other processes took {result.others:.0%} of the machine")


def as_dict(result: Result) -> dict[str, Any]:
    """With what follows from the fields."""
    ratios = [{"streams": rate.streams, "ratio": ratio} for rate, _, ratio in result.ratios()]
    share = None if math.isnan(result.floor_share) else result.floor_share
    return asdict(result) | {"floor_share": share, "ratios": ratios}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--context", type=int, default=1600, help="tokens in each prompt; 32 with --real")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each measurement")
    parser.add_argument("--cards", type=int, choices=(2, 3, 4), help="only the set with so many cards")
    parser.add_argument("--real", action="store_true", help="two cores of this machine instead of emulated cards")
    parser.add_argument("--workdir", type=Path, default=default_workdir(), help="where the model is kept")
    parser.add_argument("--json", type=Path, help="record everything measured in this file")
    given = parser.parse_args(arguments)
    if given.real:
        results = [compare_real(resolve_model("443m", given.workdir), min(given.context, 32), given.seconds)]
    else:
        model_dir = resolve_model("stages", given.workdir)
        setups = [cards for cards in SETUPS if given.cards in (None, len(cards))]
        results = [compare(model_dir, cards, given.context, given.seconds) for cards in setups]
    show(results, Console(width=180))
    if given.json is not None:
        record(given.json, "real" if given.real else "overlap", list(map(as_dict, results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
