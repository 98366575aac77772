"""A model twice the size of its devices' memory, on emulated cards: how close streaming comes to the link's floor.

    python -m benchmarks.streaming --json result.json

Cards and links are emulated as in `benchmarks.pipeline`, both scaled down alike. The floor of a step is what its layers
take to come in over the link as it was measured while they did, or what computing takes, if that is more. Beside it
stands the same without double buffering: each layer is loaded when its turn comes, then computed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.emulated import CARDS, SCALE
from benchmarks.machine import machine_info
from benchmarks.models import SHAPES, default_workdir, random_prompts, resolve_model
from core.config import load_settings
from core.costs import Batch, ModelBytes
from core.costs.cost import decode_tok_s, stage_s
from core.devices import HOST
from core.inference_pipeline import InferencePipeline
from core.models.architecture import read_architecture
from core.models.stage_model import measure_bytes
from core.placement.engine import stage_costs
from core.request import SamplingParams
from core.streaming.stream import StreamManager

SHAPE = "streaming"
SETUPS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("3090",), 11.6),
    (("5070 Ti",), 50.0),
    (("3090", "5070 Ti"), 11.6),
)
"""Cards, and their links to main memory in GB/s: PCIe 4.0 x8, PCIe 5.0 x16."""
CONTEXT = 16
CHUNK = 256
"""Tokens of the long prompts, computed in one step."""


@dataclass(frozen=True)
class Rate:
    """`tok_s` measured, and `floor_tok_s` if all links load at once, `in_turn_tok_s` if stages do so in turn."""

    tok_s: float
    floor_tok_s: float
    in_turn_tok_s: float
    link_mb_s: float
    predicted_tok_s: float


@dataclass(frozen=True)
class Result:
    """One set of cards. Each rate with double buffering, then without."""

    cards: tuple[str, ...]
    link_gb_s: float
    memory_share: float
    streamed: tuple[str, ...]
    bytes_per_step: int
    decode: tuple[Rate, Rate]
    prompt: tuple[Rate, Rate]


def weight_bytes(weights: ModelBytes) -> int:
    """Of the whole model."""
    return weights.embedding + sum(weights.layers) + weights.after + weights.head


def open_pipeline(model_dir: Path, cards: Sequence[str], link_gb_s: float, streams: int, steps: int) -> Any:
    """A loaded pipeline over emulated cards that together have half the bytes of the weights."""
    memory, total = (
        weight_bytes(measure_bytes(read_architecture(model_dir))) // 2,
        sum(CARDS[name][0] for name in cards),
    )
    devices = ",".join(
        f"sim={memory * size // total}B@{bandwidth / SCALE / 1e6:g}MB/s/{flops / SCALE / 1e9:g}GFLOPS"
        for size, bandwidth, flops in (CARDS[name] for name in cards)
    )
    tokens = max(CHUNK + 16, streams * (CONTEXT + steps + 16))
    overrides: dict[str, Any] = {
        "model.name": str(model_dir), "model.max_model_len": CHUNK + 16, "devices.devices": devices,
        "devices.sim_link": f"{link_gb_s * 1e9 / SCALE / 1e6:g}MB/s@30us", "devices.plan_streams": streams,
        "devices.plan_context": CONTEXT + steps, "engine.max_batch_size": streams, "engine.kv_cache_tokens": tokens,
        "engine.max_num_batched_tokens": CHUNK, "engine.enable_prefix_caching": False,
    }  # fmt: skip
    pipeline = InferencePipeline(load_settings(overrides=overrides))
    pipeline.load()
    return pipeline


@contextmanager
def without_double_buffering() -> Iterator[None]:
    """Slots are not handed on, so that every layer has to be asked for when its turn comes."""
    original = StreamManager._after
    StreamManager._after = lambda self, turn, index, *given: self._clock.reach(index + 1)  # type: ignore[method-assign]
    try:
        yield
    finally:
        StreamManager._after = original  # type: ignore[method-assign]


class Loads:
    """What was loaded since it was made, by device: bytes and seconds."""

    def __init__(self, pipeline: InferencePipeline) -> None:
        self._pipeline, self._before = pipeline, self._read(pipeline)

    @staticmethod
    def _read(pipeline: InferencePipeline) -> dict[str, tuple[int, float]]:
        return {dst: (s.bytes, s.seconds) for (method, src, dst), s in pipeline.transfer.stats().items() if src == HOST}

    def mb_s(self) -> float:
        """Bandwidth of the links while they loaded."""
        now = self._read(self._pipeline).items()
        nbytes = sum(n - self._before.get(dst, (0, 0.0))[0] for dst, (n, _) in now)
        return nbytes / sum(s - self._before.get(dst, (0, 0.0))[1] for dst, (_, s) in now) / 1e6


def rate_of(pipeline: InferencePipeline, batch: Batch, spent_s: float, tokens: int, mb_s: float) -> Rate:
    """`tokens` took `spent_s`, in steps like `batch`."""
    plan = pipeline.engine.plan
    stages, links = stage_costs(plan.placement, plan.problem), plan.problem.links
    compute = [stage_s(plan.costs, stage.device, stage.first, stage.last, batch) for stage in stages]
    loads = [sum(plan.costs.layer_bytes[layer] for layer in stage.streamed) / (mb_s * 1e6) for stage in stages]
    per_step = batch.tokens
    floor_s, in_turn_s = max(*loads, sum(compute)), max(sum(loads), sum(compute))
    context = batch.kv_tokens // per_step
    predicted = decode_tok_s(plan.costs, stages, links, per_step, context, 1)
    return Rate(tokens / spent_s, per_step / floor_s, per_step / in_turn_s, mb_s, predicted)


def measure_decode(pipeline: InferencePipeline, streams: int, steps: int) -> Rate:
    """All streams decode together, from their first tokens to their last."""
    params = SamplingParams(max_tokens=steps + 1, temperature=0.0, ignore_eos=True, detokenize=False)
    handles = [pipeline.submit(tokens, params) for tokens in random_prompts(streams, CONTEXT, SHAPES[SHAPE].vocab, 1)]
    for handle in handles:
        handle.get(600)
    started_s, loads = time.perf_counter(), Loads(pipeline)
    for handle in handles:
        handle.result(600)
    spent_s = time.perf_counter() - started_s
    return rate_of(pipeline, Batch.decode(streams, CONTEXT + steps // 2), spent_s, streams * steps, loads.mb_s())


def measure_prompt(pipeline: InferencePipeline, prompts: int) -> Rate:
    """Long prompts one after the other, each computed in one step."""
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)
    first, *others = random_prompts(prompts + 1, CHUNK, SHAPES[SHAPE].vocab, 2)
    pipeline.submit(first, params).result(600)
    started_s, loads = time.perf_counter(), Loads(pipeline)
    for tokens in others:
        pipeline.submit(tokens, params).result(600)
    spent_s = time.perf_counter() - started_s
    return rate_of(pipeline, Batch(CHUNK, CHUNK, 1), spent_s, prompts * CHUNK, loads.mb_s())


def compare(
    model_dir: Path, cards: tuple[str, ...], link_gb_s: float, streams: int, steps: int, prompts: int
) -> Result:
    """With and without double buffering."""
    pipeline = open_pipeline(model_dir, cards, link_gb_s, streams, steps)
    try:
        rates = [(measure_decode(pipeline, streams, steps), measure_prompt(pipeline, prompts))]
        plan = pipeline.engine.plan
        memory = sum(device.memory_limit_bytes for device in plan.devices)
        weights = weight_bytes(plan.weights)
    finally:
        pipeline.shutdown()
    with without_double_buffering():
        pipeline = open_pipeline(model_dir, cards, link_gb_s, streams, steps)
        try:
            rates.append((measure_decode(pipeline, streams, steps), measure_prompt(pipeline, prompts)))
        finally:
            pipeline.shutdown()
    (decode, prompt), (plain_decode, plain_prompt) = rates
    streamed = tuple(f"{len(stage.streamed_layers)} of {stage.num_layers}" for stage in plan.placement.stages)
    return Result(
        cards, link_gb_s, memory / weights, streamed, plan.placement.streamed_bytes, (decode, plain_decode),
        (prompt, plain_prompt),
    )  # fmt: skip


def show(results: Sequence[Result], console: Console) -> None:
    """Two rows per set of cards."""
    table = Table(title="emulated cards with half the model's memory", title_justify="left")
    table.add_column("cards")
    for column in ("link GB/s", "streamed layers", "work", "measured link MB/s", "floor tok/s", "measured tok/s"):
        table.add_column(column, justify="right")
    for column in ("of the floor", "load, then compute", "of the floor", "error of the prediction"):
        table.add_column(column, justify="right")
    for r in results:
        for work, (rate, plain) in (("decode", r.decode), ("prompt", r.prompt)):
            in_turn = f" ({rate.tok_s / rate.in_turn_tok_s:.0%} in turn)" if len(r.cards) > 1 else ""
            error = f"{rate.tok_s / rate.predicted_tok_s - 1:+.0%}" if work == "decode" else ""
            table.add_row(
                " + ".join(r.cards), f"{r.link_gb_s:g}", ", ".join(r.streamed), work, f"{rate.link_mb_s:.2f}",
                f"{rate.floor_tok_s:.2f}", f"{rate.tok_s:.2f}", f"{rate.tok_s / rate.floor_tok_s:.0%}{in_turn}",
                f"{plain.tok_s:.2f}", f"{plain.tok_s / plain.floor_tok_s:.0%}", error,
            )  # fmt: skip
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, default=8, help="streams that decode together")
    parser.add_argument("--steps", type=int, default=8, help="tokens that each of them decodes")
    parser.add_argument("--prompts", type=int, default=4, help=f"prompts of {CHUNK} tokens")
    parser.add_argument("--setups", default="1,2,3", help="which of the sets of cards")
    parser.add_argument("--workdir", type=Path, default=default_workdir(), help="where the model is kept")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    given = parser.parse_args(arguments)
    model_dir = resolve_model(SHAPE, given.workdir)
    chosen = [SETUPS[int(number) - 1] for number in given.setups.split(",")]
    results = [compare(model_dir, cards, link, given.streams, given.steps, given.prompts) for cards, link in chosen]
    show(results, Console(width=180))
    if given.json is not None:
        data = {"machine": machine_info(), "results": [asdict(result) for result in results]}
        given.json.write_text(json.dumps(data, indent=2, default=str) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
