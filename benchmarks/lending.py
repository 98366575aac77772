"""KV lent between devices: how much more fits, what it costs, and what fetching or recomputing would cost instead.

    python -m benchmarks.lending --json result.json

Two devices whose layers are divided by hand, so that the first is short of memory for KV and the second has plenty.
Main memory lends nothing here. Speeds are measured on emulated cards, a 3090 and a 5070 Ti whose times are stretched
so that a layer's weights, a link's latency and the KV of a token stand to each other as with a 14B model over a link of
11.6 GB/s and 30 us.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.emulated import CARDS, SCALE
from benchmarks.machine import machine_info
from benchmarks.models import SHAPES, default_workdir, random_prompts, resolve_model
from core.config import load_settings
from core.costs.plan import StagePlan
from core.devices import open_devices
from core.engine.model_engine import ModelEngine
from core.engine.model_plan import measure_with, plan_model
from core.execution.records import SchedulerOutput, StepDone, StepOutput
from core.inference_pipeline import InferencePipeline
from core.kv_cache.page_ops import LOCAL
from core.models.resolve import resolve_model as find_model
from core.placement.pooled import pooled_bound
from core.request import SamplingParams
from core.transfer import TransferManager

SHAPE = SHAPES["lending"]
LATENCY_US = 600
"""30 us, twenty times: a layer's weights take 12 ms here, and 0.6 ms on the cards."""
LINK = f"{11.6e9 / SCALE / 1e6:g}MB/s@{LATENCY_US}us"
_CARDS = ("3090", "5070 Ti")
SPEEDS = (1, 8192), (4, 2048)
"""Streams, and tokens in each prompt."""
CURVE = 128, 256, 512, 1024, 1536
CURVE_CONTEXT = 2048
"""Tokens of one stream that are borrowed, of so many."""
BLOCK = 16
_LOOK_S = 0.005
_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Capacity:
    """Tokens of KV held at once at the peak, beside what all memory together would hold."""

    limits: tuple[int, ...]
    layers: str
    bound: int
    lending: int
    without: int
    preemptions: int
    preemptions_without: int


@dataclass(frozen=True)
class Speed:
    """Decode rates of `streams` streams of about `context` tokens: all KV at home, a share of the first stage's blocks
    (`away`) borrowed and attended in place, and all at home after the bytes of those blocks have come over the link,
    in every step."""

    streams: int
    context: int
    away: float
    local_tok_s: float
    borrowed_tok_s: float
    fetching_tok_s: float

    @property
    def of_local(self) -> float:
        """Share of the rate that is kept."""
        return self.borrowed_tok_s / self.local_tok_s

    @property
    def over_fetching(self) -> float:
        """How many times faster."""
        return self.borrowed_tok_s / self.fetching_tok_s


@dataclass(frozen=True)
class Workload:
    """The same requests with lending and with preempting and recomputing instead, in seconds."""

    requests: int
    prompt_tokens: int
    new_tokens: int
    own_tokens: int
    lending_s: float
    recomputing_s: float
    preemptions: int
    preemptions_without: int
    same_tokens: bool

    @property
    def ratio(self) -> float:
        """How many times sooner."""
        return self.recomputing_s / self.lending_s


def planned(model_dir: Path, kind: str, layers: str, **options: Any) -> tuple[StagePlan, ...]:
    """The stages on devices with plenty of memory: what they need beside KV."""
    roomy = f"{kind}=1GiB" + ("@468MB/s/35GFLOPS" if kind == "sim" else "")
    settings = load_settings(overrides=_settings(model_dir, f"{roomy},{roomy}", layers) | _enabled(False) | options)
    devices = open_devices(settings.devices)
    measure = measure_with(settings, TransferManager())
    return tuple(plan_model(find_model(str(model_dir), None), devices, settings, measure).placement.stages)


def device_list(stages: Sequence[StagePlan], own_tokens: Sequence[int]) -> str:
    """Emulated cards with room for so many tokens of KV beside their layers."""
    parts = []
    for stage, tokens, name in zip(stages, own_tokens, _CARDS, strict=True):
        _, bandwidth, flops = CARDS[name]
        size = stage.weight_bytes + stage.workspace_bytes + stage.kv_bytes_per_token * tokens
        parts.append(f"sim={size}B@{bandwidth / SCALE / 1e6:g}MB/s/{flops / SCALE / 1e9:g}GFLOPS")
    return ",".join(parts)


def _settings(model_dir: Path, devices: str, layers: str) -> dict[str, Any]:
    return {
        "model.name": str(model_dir), "devices.devices": devices, "devices.layers": layers,
        "devices.sim_link": LINK if "sim" in devices else None, "engine.cohorts": 1, "engine.max_batch_size": 64,
        "engine.block_size": BLOCK,
        "engine.max_num_batched_tokens": 512, "lending.host_bytes": 0, "lending.lend_ratio": 1.0,
        "lending.reclaim_threshold": 1.0, "engine.enable_prefix_caching": False,
    }  # fmt: skip


def _enabled(lending: bool) -> dict[str, Any]:
    return {"lending.enabled": lending}


def opened(settings: dict[str, Any]) -> InferencePipeline:
    """A loaded pipeline."""
    pipeline = InferencePipeline(load_settings(overrides=settings))
    pipeline.load()
    return pipeline


def blocks_away(engine: ModelEngine) -> int:
    """Blocks of all stages that are borrowed now; on the engine thread."""
    return sum(
        len(region.blocks) for _, pages in engine.kv.pages.mapped for i, region in pages.regions.items() if i != LOCAL
    )


def _greedy(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False)


# -- how much fits --------------------------------------------------------------------------------------------------


def measure_capacity(model_dir: Path, layers: str = "5,1", own_tokens: int = 1600, prompt: int = 240) -> Capacity:
    """Requests until nothing more fits.

    Most layers on the first device; the second is as large as its layer and much KV need.
    """
    stages = planned(model_dir, "cpu", layers)
    first = stages[0].weight_bytes + stages[0].workspace_bytes + stages[0].kv_bytes_per_token * own_tokens
    second = stages[1].weight_bytes + stages[1].workspace_bytes + stages[1].kv_bytes_per_token * 8 * own_tokens
    limits = (first, max(second, first * 16 // 24))
    found = []
    for lending in (True, False):
        settings = _settings(model_dir, ",".join(f"cpu={limit}B" for limit in limits), layers)
        pipeline = opened(settings | _enabled(lending) | {"engine.kv_cache_tokens": None if lending else own_tokens})
        try:
            bound = pooled_bound(pipeline.engine.plan.placement.stages)
            count = min(60, bound // prompt + 4)
            peak = _peak_tokens(pipeline, random_prompts(count, prompt, SHAPE.vocab, 3))
            found.append((peak, pipeline.engine.batcher.stats.preemptions, bound))
        finally:
            pipeline.shutdown()
    (with_it, preempted, bound), (without, preempted_without, _) = found
    return Capacity(limits, layers, bound, with_it, without, preempted, preempted_without)


def _peak_tokens(pipeline: InferencePipeline, prompts: Sequence[list[int]]) -> int:
    kv = pipeline.engine.kv
    handles = [pipeline.submit(prompt, _greedy(40)) for prompt in prompts]
    peak = 0
    while not all(handle.finished for handle in handles):
        peak = max(peak, kv.pool.num_referenced * kv.block_size)
        time.sleep(_LOOK_S)
    for handle in handles:
        handle.result(_TIMEOUT_S)
    return peak


# -- how fast it is -------------------------------------------------------------------------------------------------


def measure_speed(model_dir: Path, stages: Sequence[StagePlan], streams: int, context: int, steps: int) -> Speed:
    """Decode with all KV at home, with half of the first stage's borrowed, and with that half fetched instead."""
    total = streams * (context + steps + 64)
    found = _decode(model_dir, stages, streams, context, steps, total // 2)
    local = _decode(model_dir, stages, streams, context, steps, total)
    fetching = _decode(model_dir, stages, streams, context, steps, total, found.blocks)
    return Speed(streams, context + steps // 2, found.share, local.tok_s, found.tok_s, fetching.tok_s)


def measure_curve(model_dir: Path, stages: Sequence[StagePlan], steps: int) -> list[dict[str, float]]:
    """What a step takes longer than with all KV at home, by how many tokens are borrowed."""
    total = CURVE_CONTEXT + steps + 64
    local_s = 1 / _decode(model_dir, stages, 1, CURVE_CONTEXT, steps, total).tok_s
    points = []
    for tokens in CURVE:
        own = CURVE_CONTEXT + steps // 2 - tokens
        found = _decode(model_dir, stages, 1, CURVE_CONTEXT, steps, own)
        fetching = _decode(model_dir, stages, 1, CURVE_CONTEXT, steps, total, found.blocks)
        borrowed = found.blocks * BLOCK
        point = {"attending_s": 1 / found.tok_s - local_s, "fetching_s": 1 / fetching.tok_s - local_s}
        points.append({"context": CURVE_CONTEXT, "borrowed_tokens": borrowed, "local_s": local_s, **point})
    return points


@dataclass(frozen=True)
class _Decoded:
    """A rate, and the blocks of the first stage that were away in the middle: how many, and their share."""

    tok_s: float
    blocks: int
    share: float


def _decode(
    model_dir: Path, stages: Sequence[StagePlan], streams: int, context: int, steps: int, own: int, fetched: int = 0
) -> _Decoded:
    """With room for `own` tokens of KV in the first stage; so many blocks are fetched before every step."""
    total = streams * (context + steps + 64)
    devices = device_list(stages, (own, 2 * total))
    pipeline = opened(_settings(model_dir, devices, "3,3") | {"engine.kv_cache_tokens": total})
    prompts = random_prompts(streams, context, SHAPE.vocab, 5)
    try:
        if fetched:
            _fetch_every_step(pipeline.engine, fetched)
        return _decode_rate(pipeline, prompts, steps)
    finally:
        pipeline.shutdown()


def _decode_rate(pipeline: InferencePipeline, prompts: Sequence[list[int]], steps: int) -> _Decoded:
    """Tokens per second from when every stream has its first tokens until half of the last ones."""
    engine = pipeline.engine
    batcher = engine.batcher
    handles = [pipeline.submit(prompt, _greedy(steps)) for prompt in prompts]
    for handle in handles:
        handle.get(_TIMEOUT_S)
    begun, begun_s = _next_tokens(lambda: batcher.stats.total_tokens, 2 * len(handles))
    away, held = batcher.call(lambda: (blocks_away(engine), engine.kv.pool.num_referenced)).result(60)
    ended, ended_s = _next_tokens(lambda: batcher.stats.total_tokens, (steps // 2) * len(handles))
    for handle in handles:
        handle.abort()
    for handle in handles:
        handle.result(60)
    return _Decoded((ended - begun) / (ended_s - begun_s), away, away / held)


def _next_tokens(count: Callable[[], int], more: int) -> tuple[int, float]:
    """The moment when so many tokens more are there."""
    wanted = count() + more
    while (now := count()) < wanted:
        time.sleep(0.001)
    return now, time.perf_counter()


class _Fetching:
    """A runner whose decode steps begin with the bytes of borrowed blocks coming over the link. They are not carried
    back and take no memory, which favours fetching."""

    def __init__(self, engine: ModelEngine, blocks: int) -> None:
        kv = engine.stages[0].kv
        assert kv is not None
        self._runner = engine.runner
        self._data = torch.zeros(blocks * kv.page_bytes, dtype=torch.uint8)
        self._transfer = engine.transfer
        self._owner, self._lender = engine.stages[0].device, engine.stages[1].device

    def execute(self, output: SchedulerOutput) -> StepOutput:
        """See `Runner`."""
        if bool((output.record.counts == 1).all()):
            self._transfer.send(self._data, self._lender, self._owner)
        return self._runner.execute(output)

    def submit(self, output: SchedulerOutput, done: StepDone) -> None:
        """See `Runner`."""
        self._runner.submit(output, done)


def _fetch_every_step(engine: ModelEngine, blocks: int) -> None:
    fetching = _Fetching(engine, blocks)
    engine.batcher.call(lambda: setattr(engine.batcher, "_runner", fetching)).result(60)


# -- against recomputing --------------------------------------------------------------------------------------------


FP32 = {"model.dtype": "float32"}
"""The tokens of a random model in bf16 change with the order in which attention is added up, which is no one's error:
what is compared token by token is computed in fp32."""


def measure_workload(model_dir: Path, requests: int, prompt: int, new: int, own_tokens: int) -> Workload:
    """Requests that need more than the first stage holds, all at once, until the last is done."""
    stages = planned(model_dir, "sim", "3,3", **FP32)
    prompts = random_prompts(requests, prompt, SHAPE.vocab, 7)
    total = requests * (prompt + new + 32)
    runs = []
    for lending in (True, False):
        devices = device_list(stages, (own_tokens, 2 * total))
        settings = _settings(model_dir, devices, "3,3") | _enabled(lending) | FP32
        pipeline = opened(settings | {"engine.kv_cache_tokens": total if lending else own_tokens})
        try:
            started_s = time.perf_counter()
            handles = [pipeline.submit(tokens, _greedy(new)) for tokens in prompts]
            answers = [handle.result(_TIMEOUT_S).completions[0].token_ids for handle in handles]
            runs.append((time.perf_counter() - started_s, pipeline.engine.batcher.stats.preemptions, answers))
        finally:
            pipeline.shutdown()
    (lent_s, preempted, ours), (alone_s, preempted_alone, theirs) = runs
    return Workload(
        requests, prompt, new, own_tokens, lent_s, alone_s, preempted, preempted_alone, list(ours) == list(theirs)
    )


def show(results: dict[str, Any], console: Console) -> None:
    """A line per measurement."""
    for item in results.get("capacity", ()):
        console.print(
            f"KV tokens held at once: {item['lending']} with lending, {item['without']} without, bound {item['bound']}"
            f" ({item['lending'] / item['bound']:.1%}); preemptions {item['preemptions']} and "
            f"{item['preemptions_without']}"
        )
    for item in results.get("speed", ()):
        console.print(
            f"{item['streams']} streams of {item['context']} tokens, {item['away']:.0%} borrowed: "
            f"{item['borrowed_tok_s']:.2f} tok/s, all local {item['local_tok_s']:.2f} ({item['of_local']:.1%} kept), "
            f"fetching {item['fetching_tok_s']:.2f} ({item['over_fetching']:.1f} times slower)"
        )
    for item in results.get("curve", ()):
        console.print(
            f"{item['borrowed_tokens']} of {item['context']} tokens borrowed: {item['attending_s'] * 1e3:.1f} ms more "
            f"per step, fetching {item['fetching_s'] * 1e3:.1f} ms more (a step takes {item['local_s'] * 1e3:.1f} ms)"
        )
    for item in results.get("workload", ()):
        console.print(
            f"{item['requests']} requests of {item['prompt_tokens']}+{item['new_tokens']} tokens, room for "
            f"{item['own_tokens']}: {item['lending_s']:.1f} s with lending, {item['recomputing_s']:.1f} s with "
            f"preempting ({item['ratio']:.2f} times); preemptions {item['preemptions']} and "
            f"{item['preemptions_without']}; same tokens: {item['same_tokens']}"
        )


def _speed_dict(speed: Speed) -> dict[str, Any]:
    return asdict(speed) | {"of_local": speed.of_local, "over_fetching": speed.over_fetching}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lending", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=("capacity", "speed", "curve", "workload"), help="only this measurement")
    parser.add_argument("--steps", type=int, default=40, help="tokens decoded in each")
    parser.add_argument("--workdir", type=Path, default=default_workdir(), help="where the model is kept")
    parser.add_argument("--json", type=Path, help="record everything measured in this file")
    given = parser.parse_args(arguments)
    model_dir = resolve_model("lending", given.workdir)
    wanted = (given.only,) if given.only else ("capacity", "speed", "curve", "workload")
    results: dict[str, Any] = {}
    stages = planned(model_dir, "sim", "3,3") if set(wanted) & {"speed", "curve"} else ()
    if "capacity" in wanted:
        results["capacity"] = [asdict(measure_capacity(model_dir))]
    if "speed" in wanted:
        speeds = [measure_speed(model_dir, stages, count, length, given.steps) for count, length in SPEEDS]
        results["speed"] = list(map(_speed_dict, speeds))
    if "curve" in wanted:
        results["curve"] = measure_curve(model_dir, stages, given.steps)
    if "workload" in wanted:
        measured = measure_workload(model_dir, 6, 640, 96, 1400)
        results["workload"] = [asdict(measured) | {"ratio": measured.ratio}]
    show(results, Console(width=180))
    if given.json is not None:
        data = json.loads(given.json.read_text()) if given.json.exists() else {}
        given.json.write_text(json.dumps(data | {"machine": machine_info()} | results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
