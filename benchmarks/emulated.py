"""Emulated cards to measure on, and decoding measured in whole rounds.

Emulated devices compute for real and then wait until a roofline's time has passed, so the pace is theirs, not the
CPU's. Speeds and links are the cards' over `SCALE`, so that a stage takes tens of milliseconds and what Python and the
real computing take disappears in it. The model has many thin layers with much KV: cuts come out nearly even, and it is
KV that takes the time, as with long contexts and many streams.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.machine import machine_info
from benchmarks.models import SHAPES, random_prompts
from core.config import load_settings
from core.costs import DeviceProfile
from core.engine.model_plan import ModelPlan, cohort_policy
from core.inference_pipeline import InferencePipeline
from core.placement.pooled import borrowing_tok_s
from core.request import SamplingParams

SCALE = 2000
CARDS = {
    "A100": (40, 1555e9, 312e12), "4090": (24, 1008e9, 165e12), "3090": (24, 936e9, 71e12),
    "5070 Ti": (16, 896e9, 88e12), "3060": (12, 360e9, 25.5e12), "2060": (6, 336e9, 25.8e12),
    "host": (32, 80e9, 4e12),
}  # fmt: skip
"""GiB, memory bandwidth in bytes per second, dense fp16 operations per second; "host" is a desktop's processor."""
LINK = f"{11.6e9 / SCALE / 1e6:g}MB/s@30us"
SHAPE = SHAPES["stages"]
NEW_TOKENS = 1000
OWN_TOKENS = 16
"""At the end of each prompt. What comes before is the same for all and computed once, so that it does not take long."""
SETTLED_ROUNDS = 2
LEAST_ROUNDS = 4
_LOOK_S = 0.002


@dataclass(frozen=True)
class Rate:
    """Decoding by `streams` streams of `context` tokens on average: tokens per second measured and predicted, and each
    stage's busy share.
    """

    streams: int
    context: int
    cohorts: int
    tok_s: float
    predicted_tok_s: float
    busy: tuple[float, ...]

    @property
    def error(self) -> float:
        """0.1: a tenth faster than predicted."""
        return self.tok_s / self.predicted_tok_s - 1


def device_list(cards: Sequence[str], room_bytes: int) -> str:
    """The cards as emulated devices, scaled down; together they have `room_bytes` of memory."""
    total = sum(CARDS[name][0] for name in cards)
    parts = []
    for name in cards:
        size, bandwidth, flops = CARDS[name]
        limit = room_bytes * size // total
        parts.append(f"sim={limit}B@{bandwidth / SCALE / 1e6:g}MB/s/{flops / SCALE / 1e9:g}GFLOPS")
    return ",".join(parts)


def needed_bytes(streams: int, context: int) -> int:
    """Weights and KV of the model, roughly."""
    layer = 2 * (4 * SHAPE.hidden**2 + 3 * SHAPE.hidden * SHAPE.intermediate)
    kv = 4 * SHAPE.kv_heads * SHAPE.head_dim * streams * (context + NEW_TOKENS)
    return SHAPE.layers * (layer + kv) + 4 * SHAPE.vocab * SHAPE.hidden


def open_pipeline(
    model_dir: Path, cards: Sequence[str], streams: int, context: int, *, slack: float = 1.5, **settings: Any
) -> InferencePipeline:
    """A loaded pipeline over the emulated cards, planned for that many streams.

    `slack` is the memory of all cards together over what the model and its KV need. `settings` as "section.key".
    """
    room = int(slack * needed_bytes(streams, context))
    overrides: dict[str, Any] = {
        "model.name": str(model_dir), "devices.devices": device_list(cards, room),
        "devices.sim_link": LINK, "devices.plan_streams": streams, "devices.plan_context": context,
        "engine.max_batch_size": streams, "engine.kv_cache_tokens": streams * (context + NEW_TOKENS),
        "engine.max_num_batched_tokens": 512,
    }  # fmt: skip
    pipeline = InferencePipeline(load_settings(overrides=overrides | settings))
    pipeline.load()
    return pipeline


def measure(
    pipeline: InferencePipeline, streams: int, context: int, seconds: float, *, vocab: int = SHAPE.vocab
) -> Rate:
    """Decode with all streams, once all prompts are computed, for about `seconds` and no less than a few rounds."""
    engine = pipeline.engine
    params = SamplingParams(max_tokens=NEW_TOKENS - 32, temperature=0.0, ignore_eos=True, detokenize=False)
    own = min(OWN_TOKENS, context - 1)
    shared = random_prompts(1, context - own, vocab, 1)[0]
    first = pipeline.submit(shared, SamplingParams(max_tokens=1, ignore_eos=True, detokenize=False))
    first.result(600)
    handles = [pipeline.submit(shared + end, params) for end in random_prompts(streams, own, vocab, 2)]
    for handle in handles:
        handle.get(600)
    tok_s, busy = _whole_rounds(pipeline, streams, seconds)
    mean = engine.batcher.call(lambda: engine.batcher.scheduler.mean_context).result(60)
    assert engine.batcher.stats.running == streams, "streams ended during the measurement: choose a shorter one"
    for handle in handles:
        handle.abort()
    for handle in handles:
        handle.result(60)
    plan = engine.plan
    cohorts = cohort_policy(plan, engine.settings).choose(streams, mean, 0).cohorts
    mean -= int(seconds * tok_s / (2 * streams))  # of what was decoded meanwhile, half lay before the middle
    return Rate(streams, mean, cohorts, tok_s, predicted_tok_s(plan, streams, mean, cohorts), busy)


def predicted_tok_s(
    plan: ModelPlan, streams: int, context: int, cohorts: int, profiles: Sequence[DeviceProfile] | None = None
) -> float:
    """What the cost model expects of a plan; with other `profiles` of its devices than those it was made with."""
    request = plan.problem
    if profiles is not None:
        measured = zip(request.devices, profiles, strict=True)
        request = replace(request, devices=tuple(replace(device, profile=profile) for device, profile in measured))
    return borrowing_tok_s(request, plan.placement, plan.pooled, streams, context, cohorts)


def record(path: Path, section: str, results: Sequence[Mapping[str, Any]]) -> None:
    """Write results to a section of a JSON file, in place of those of the same cards and streams; the rest stays."""
    data = json.loads(path.read_text()) if path.exists() else {}
    new = {_key(result) for result in results}
    kept = [old for old in data.get(section, ()) if _key(old) not in new]
    data |= {"machine": machine_info(), section: [*kept, *results]}
    path.write_text(json.dumps(data, indent=2) + "\n")


def _key(result: Mapping[str, Any]) -> tuple[Any, ...]:
    return (*sorted(result["cards"]), result.get("streams"))


def _whole_rounds(pipeline: InferencePipeline, streams: int, seconds: float) -> tuple[float, tuple[float, ...]]:
    """Tokens per second, and busy shares of the stages, over rounds in which every stream gained a token."""
    batcher, stages = pipeline.engine.batcher, pipeline.engine.stages
    seen: list[tuple[float, int, tuple[float, ...]]] = []
    start = batcher.stats.total_tokens + SETTLED_ROUNDS * streams
    end_s = float("inf")
    while True:
        now_s, tokens = time.perf_counter(), batcher.stats.total_tokens
        if tokens >= start and (not seen or tokens > seen[-1][1]):
            seen.append((now_s, tokens, tuple(stage.busy_s for stage in stages)))
            end_s = seen[0][0] + seconds
            if now_s > end_s and tokens - seen[0][1] >= LEAST_ROUNDS * streams:
                break
        time.sleep(_LOOK_S)
    begun_s, begun, busy = seen[0]
    ended_s, ended, worked = next(entry for entry in reversed(seen) if (entry[1] - begun) % streams == 0)
    spent_s, spans = ended_s - begun_s, zip(busy, worked, strict=True)
    assert ended > begun, "no whole round was seen"
    return (ended - begun) / spent_s, tuple((after - before) / spent_s for before, after in spans)
