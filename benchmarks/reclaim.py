"""How long a lender waits for its memory under full load, by urgency, beside the bound that is announced.

    python -m benchmarks.reclaim --json result.json

The first of three devices is short of memory for KV, the second has few layers and lends, the third has none and
lends all it has, and main memory stands by. Requests keep them busy; again and again the device that lent most asks for
half of it. Every answer is compared with that of a run in which nothing was reclaimed.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.lending import FP32, SHAPE, opened, planned
from benchmarks.machine import machine_info
from benchmarks.models import default_workdir, random_prompts, resolve_model
from core.inference_pipeline import InferencePipeline
from core.lending import Urgency
from core.request import SamplingParams

OWN_TOKENS = 1600
REQUESTS, PROMPT, NEW = 12, 240, 64
_PARAMS = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True, detokenize=False)
_LOOK_S = 0.002


def _start(model_dir: Path) -> InferencePipeline:
    first, second = planned(model_dir, "cpu", "5,1", **FP32)
    pages = first.kv_bytes_per_token
    sizes = [
        first.weight_bytes + first.workspace_bytes + OWN_TOKENS * pages,
        second.weight_bytes + second.workspace_bytes + 4 * OWN_TOKENS * (second.kv_bytes_per_token + pages),
        4 * OWN_TOKENS * pages,
    ]
    return opened(
        {
            "model.name": str(model_dir), "devices.devices": ",".join(f"cpu={size}B" for size in sizes),
            "devices.layers": "5,1", "engine.cohorts": 1, "engine.max_batch_size": 64,
            "engine.max_num_batched_tokens": 512, "engine.kv_cache_tokens": 4 * OWN_TOKENS,
            "lending.lend_ratio": 1.0, "lending.reclaim_threshold": 1.0, "lending.extent_blocks": 8,
        }
        | FP32
    )  # fmt: skip


ROUNDS = {Urgency.CRITICAL: 50, Urgency.HIGH: 20, Urgency.MEDIUM: 6, Urgency.LOW: 3}


class Load:
    """A thread that asks the same things over and over, and compares the answers."""

    def __init__(self, pipeline: InferencePipeline) -> None:
        self.answers = self.changed = 0
        self._pipeline = pipeline
        self._prompts = random_prompts(REQUESTS, PROMPT, SHAPE.vocab, 17)
        self._expected = self._ask()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _ask(self) -> list[list[int]]:
        handles = [self._pipeline.submit(prompt, _PARAMS) for prompt in self._prompts]
        return [list(handle.result(600).completions[0].token_ids) for handle in handles]

    def _run(self) -> None:
        while not self._ended.is_set():
            answers = self._ask()
            self.answers += len(answers)
            self.changed += sum(answer != right for answer, right in zip(answers, self._expected, strict=True))

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()


def measure(model_dir: Path) -> Iterator[dict[str, Any]]:
    """Each urgency in turn."""
    pipeline = _start(model_dir)
    try:
        for urgency in ROUNDS:
            yield _measure_urgency(pipeline, urgency)
    finally:
        pipeline.shutdown()


def _measure_urgency(pipeline: InferencePipeline, urgency: Urgency) -> dict[str, Any]:
    waits: list[float] = []
    stats = pipeline.engine.batcher
    with Load(pipeline) as load:
        started_s, before = time.perf_counter(), stats.stats.steps
        while len(waits) < ROUNDS[urgency]:
            waited_s = _reclaim(pipeline, urgency)
            waits += [] if waited_s is None else [waited_s]
            time.sleep(_LOOK_S)
        step_s = (time.perf_counter() - started_s) / max(1, stats.stats.steps - before)
    waits.sort()
    return {
        "urgency": urgency.label, "bound_s": urgency.bound_s, "reclaims": len(waits), "answers": load.answers,
        "changed_answers": load.changed, "median_s": waits[len(waits) // 2], "longest_s": waits[-1], "step_s": step_s,
    }  # fmt: skip


def _reclaim(pipeline: InferencePipeline, urgency: Urgency) -> float | None:
    """Seconds until half of what a device lent is its own again; None if nothing is lent."""
    engine = pipeline.engine
    assert engine.memory.overflow is not None
    lending = engine.memory.overflow.lending
    asking: list[str] = []

    def ask() -> int:
        asking[:] = [max((device.name for device in engine.plan.devices), key=lambda n: lending.budget(n).lent_bytes)]
        return lending.request_reclaim(asking[0], lending.budget(asking[0]).lent_bytes // 2, urgency)

    def asked() -> int:
        return sum(lease.reclaim_bytes for lease in lending.leases(lender=asking[0]))

    started_s = time.perf_counter()
    if not engine.batcher.call(ask).result(60):
        return None
    while engine.batcher.call(asked).result(60):
        time.sleep(_LOOK_S)
    return time.perf_counter() - started_s


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reclaim", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=default_workdir(), help="where the model is kept")
    parser.add_argument("--json", type=Path, help="record everything measured in this file")
    given = parser.parse_args(arguments)
    console, found = Console(width=140), []
    for item in measure(resolve_model("lending", given.workdir)):
        found.append(item)
        console.print(
            f"{item['urgency']}: {item['reclaims']} reclaims, median {item['median_s']:.2f} s, longest "
            f"{item['longest_s']:.2f} s, bound {item['bound_s']:g} s (a step takes {item['step_s'] * 1e3:.0f} ms); "
            f"{item['changed_answers']} of {item['answers']} answers changed"
        )
    if given.json is not None:
        data = json.loads(given.json.read_text()) if given.json.exists() else {}
        given.json.write_text(json.dumps(data | {"machine": machine_info(), "reclaim": found}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
