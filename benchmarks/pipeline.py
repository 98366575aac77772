"""Overlapped stages beside the same placement without overlap, on emulated devices that do not match.

    python -m benchmarks.pipeline --json result.json

Emulated devices compute for real and then wait until a roofline's time has passed, so the pace is theirs, not the
CPU's. Speeds and link are the cards' scaled down alike, to stages of tens of milliseconds; memory is scaled so that
every card is needed. For each set of cards the same layers are loaded with one step in flight and with as many as the
engine chooses; what was predicted stands beside what was measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine_info
from benchmarks.models import SHAPES, default_workdir, random_prompts, resolve_model
from core.config import load_settings
from core.inference_pipeline import InferencePipeline
from core.placement import Batch, best_cohorts, decode_tok_s, pipeline_s
from core.placement.engine import stage_costs
from core.request import SamplingParams

SCALE = 1000
"""Speeds are the cards' over this."""
CARDS = {
    "3090": (24, 936e9, 71e12), "5070 Ti": (16, 896e9, 88e12), "3060": (12, 360e9, 51e12), "2060": (6, 336e9, 52e12),
}  # fmt: skip
"""GiB, memory bandwidth in bytes per second, dense fp16 operations per second with fp32 sums."""
SETUPS = (("3090", "5070 Ti"), ("3090", "5070 Ti", "3060"), ("3090", "5070 Ti", "3060", "2060"))
LINK = f"{11.6e9 / SCALE / 1e6:g}MB/s@30us"
NEW_TOKENS = 1000
SLACK = 1.5
"""Memory of all devices together over what the model and its KV need."""
SETTLE_S = 1.0


@dataclass(frozen=True)
class Rate:
    """Decoding by `streams` streams: tokens per second measured and predicted, and each stage's busy share."""

    streams: int
    cohorts: int
    tok_s: float
    predicted_tok_s: float
    busy: tuple[float, ...]

    @property
    def error(self) -> float:
        """0.1: a tenth faster than predicted."""
        return self.tok_s / self.predicted_tok_s - 1


@dataclass(frozen=True)
class Result:
    """One set of cards. `floor_share` is one stream's rate over the one that bytes, bandwidths and hops allow."""

    cards: tuple[str, ...]
    layers: tuple[int, ...]
    one: Rate
    floor_share: float
    sequential: Rate
    overlapped: Rate

    @property
    def ratio(self) -> float:
        """How many times faster with overlap."""
        return self.overlapped.tok_s / self.sequential.tok_s


def device_list(cards: Sequence[str], needed_bytes: int) -> str:
    """The cards as emulated devices, scaled down."""
    total = sum(CARDS[name][0] for name in cards)
    parts = []
    for name in cards:
        size, bandwidth, flops = CARDS[name]
        limit = int(SLACK * needed_bytes * size / total)
        parts.append(f"sim={limit}B@{bandwidth / SCALE / 1e6:g}MB/s/{flops / SCALE / 1e9:g}GFLOPS")
    return ",".join(parts)


def needed_bytes(streams: int, context: int) -> int:
    """Weights and KV of the model, roughly."""
    shape = SHAPES["stages"]
    layer = 2 * (4 * shape.hidden**2 + 3 * shape.hidden * shape.intermediate)
    kv = 4 * shape.kv_heads * shape.head_dim * streams * (context + NEW_TOKENS)
    return shape.layers * (layer + kv) + 4 * shape.vocab * shape.hidden


def open_pipeline(
    model_dir: Path, cards: Sequence[str], streams: int, context: int, **settings: Any
) -> InferencePipeline:
    """A loaded pipeline over the emulated cards."""
    overrides: dict[str, Any] = {
        "model.name": str(model_dir), "devices.devices": device_list(cards, needed_bytes(streams, context)),
        "devices.sim_link": LINK, "devices.plan_streams": streams, "devices.plan_context": context + NEW_TOKENS,
        "engine.max_batch_size": streams, "engine.kv_cache_tokens": streams * (context + NEW_TOKENS),
        "engine.max_num_batched_tokens": 256,
    }  # fmt: skip
    pipeline = InferencePipeline(load_settings(overrides=overrides | settings))
    pipeline.load()
    return pipeline


def measure(pipeline: InferencePipeline, streams: int, context: int, seconds: float) -> Rate:
    """Decode with all streams for `seconds`, once all prompts are computed."""
    engine, plan = pipeline.engine, pipeline.engine.plan
    params = SamplingParams(max_tokens=NEW_TOKENS - 32, temperature=0.0, ignore_eos=True, detokenize=False)
    prompts = random_prompts(streams, context, SHAPES["stages"].vocab, 1)
    handles = [pipeline.submit(tokens, params) for tokens in prompts]
    for handle in handles:
        handle.get(600)
    time.sleep(SETTLE_S)
    before = [stage.busy_s for stage in engine.stages]
    tokens, started_s = engine.batcher.stats.total_tokens, time.perf_counter()
    lengths = engine.batcher.scheduler.mean_context
    time.sleep(seconds)
    spent_s, produced = time.perf_counter() - started_s, engine.batcher.stats.total_tokens - tokens
    assert engine.batcher.stats.running == streams, "streams ended during the measurement: choose a shorter one"
    busy = tuple((stage.busy_s - old) / spent_s for stage, old in zip(engine.stages, before, strict=True))
    for handle in handles:
        handle.abort()
    for handle in handles:
        handle.result(60)
    stages, links = stage_costs(plan.placement, plan.request), plan.request.links
    mean = lengths + produced // (2 * streams)
    fixed = engine.settings.engine.cohorts
    cohorts = min(fixed or streams, best_cohorts(plan.costs, stages, links, streams, mean))
    predicted = decode_tok_s(plan.costs, stages, links, streams, mean, cohorts)
    return Rate(streams, cohorts, produced / spent_s, predicted, busy)


def floor_tok_s(pipeline: InferencePipeline, context: int) -> float:
    """Tokens per second of one stream when every byte is read once and every hop made once."""
    plan = pipeline.engine.plan
    stages = stage_costs(plan.placement, plan.request)
    compute, hops = pipeline_s(plan.costs, stages, plan.request.links, Batch.decode(1, context))
    return 1 / (sum(compute) + sum(hops))


def compare(model_dir: Path, cards: tuple[str, ...], streams: int, context: int, seconds: float) -> Result:
    """The same layers with and without overlap."""
    pipeline = open_pipeline(model_dir, cards, streams, context)
    try:
        one = measure(pipeline, 1, context, seconds)
        share = one.tok_s / floor_tok_s(pipeline, context + 40)
        overlapped = measure(pipeline, streams, context, seconds)
        layers = tuple(stage.num_layers for stage in pipeline.engine.plan.placement.stages)
        counts = {stage.device_index: stage.num_layers for stage in pipeline.engine.plan.placement.stages}
        by_hand = ",".join(str(counts.get(index, 0)) for index in range(len(cards)))
    finally:
        pipeline.shutdown()
    pipeline = open_pipeline(model_dir, cards, streams, context, **{"engine.cohorts": 1, "devices.layers": by_hand})
    try:
        sequential = measure(pipeline, streams, context, seconds)
    finally:
        pipeline.shutdown()
    return Result(cards, layers, one, share, sequential, overlapped)


def compare_real(model_dir: Path, streams: int, context: int, seconds: float) -> Result:
    """Two parts of this machine's CPU with one core each: nothing is emulated."""
    settings: dict[str, Any] = {
        "model.name": str(model_dir), "devices.devices": "cpu=4GiB,cpu=4GiB", "devices.cpu_threads": 1,
        "devices.layers": "11,11", "devices.plan_streams": streams, "devices.plan_context": context,
        "engine.max_batch_size": streams, "engine.kv_cache_tokens": streams * (context + NEW_TOKENS),
    }  # fmt: skip
    rates = []
    for cohorts in (2, 1):
        pipeline = InferencePipeline(load_settings(overrides=settings | {"engine.cohorts": cohorts}))
        pipeline.load()
        try:
            rates.append(measure(pipeline, streams, context, seconds))
        finally:
            pipeline.shutdown()
    overlapped, sequential = rates
    return Result(("cpu", "cpu"), (11, 11), sequential, float("nan"), sequential, overlapped)


def show(results: Sequence[Result], console: Console) -> None:
    """A row per set of cards."""
    table = Table(title="emulated cards, decode", title_justify="left")
    for column in ("cards", "layers", "1 stream", "of its floor", "streams", "one at a time", "overlapped", "ratio"):
        table.add_column(column, justify="left" if column == "cards" else "right")
    for column in ("in flight", "busy", "error of the prediction: 1, sequential, overlapped"):
        table.add_column(column, justify="right")
    for r in results:
        errors = ", ".join(f"{rate.error:+.0%}" for rate in (r.one, r.sequential, r.overlapped))
        table.add_row(
            " + ".join(r.cards), ",".join(map(str, r.layers)), f"{r.one.tok_s:.1f} tok/s", f"{r.floor_share:.0%}",
            str(r.overlapped.streams), f"{r.sequential.tok_s:.1f}", f"{r.overlapped.tok_s:.1f}", f"{r.ratio:.2f}",
            str(r.overlapped.cohorts), " ".join(f"{share:.0%}" for share in r.overlapped.busy), errors,
        )  # fmt: skip
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, default=16, help="streams that decode together")
    parser.add_argument("--context", type=int, default=1600, help="tokens in each prompt")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of each measurement")
    parser.add_argument("--setups", type=int, default=len(SETUPS), help="how many of the sets of cards")
    parser.add_argument("--real", action="store_true", help="two cores of this machine instead of emulated cards")
    parser.add_argument("--workdir", type=Path, default=default_workdir(), help="where the model is kept")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    given = parser.parse_args(arguments)
    console = Console(width=180)
    if given.real:
        show([compare_real(resolve_model("443m", given.workdir), given.streams, 32, given.seconds)], console)
        return 0
    model_dir = resolve_model("stages", given.workdir)
    results = [
        compare(model_dir, cards, given.streams, given.context, given.seconds) for cards in SETUPS[: given.setups]
    ]
    show(results, console)
    if given.json is not None:
        data = {"machine": machine_info(), "results": [asdict(r) | {"ratio": r.ratio} for r in results]}
        given.json.write_text(json.dumps(data, indent=2, default=str) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
