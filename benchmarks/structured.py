"""What an answer that keeps to a JSON schema costs a batch: one among other streams, beside the same batch without.

    python -m benchmarks.structured [--model 443m] [--streams 16] [--pairs 20]

Both batches run in one engine, in turn; in one of them the first stream has a grammar. What is compared is the time of
a step while all streams decode, which is what neighbours notice, too. The machine's speed drifts, so the ratio of each
pair counts, and its median's 95 % interval.
"""

from __future__ import annotations

import argparse
import itertools
import json
import queue
import statistics
import sys
import time
from pathlib import Path

from benchmarks.machine import machine_info, usable_cores
from benchmarks.models import default_workdir, random_prompts, resolve_model
from benchmarks.pairs import LEAST_PAIRS, interval
from core.batching.output import Sink
from core.config import load_settings
from core.errors import VRAMancerError
from core.grammars import forms
from core.inference_pipeline import InferencePipeline
from core.request import SamplingParams

PART = {
    "type": "object",
    "properties": {
        "name": {"type": "string"}, "kind": {"enum": ["card", "machine", "link"]}, "size": {"type": "number"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "kind", "size", "tags"],
    "additionalProperties": False,
}  # fmt: skip
SCHEMA = {"type": "array", "items": PART, "minItems": 1000}
"""Too long to come to an end."""


def step_s(pipeline: InferencePipeline, prompts: list[list[int]], tokens: int, grammar: str | None) -> float:
    """Seconds of a step in which all streams decode; the first of them keeps to `grammar`."""
    free = SamplingParams(max_tokens=tokens, temperature=1.0, seed=1, ignore_eos=True)
    kept = SamplingParams(max_tokens=tokens, temperature=1.0, seed=1, ignore_eos=True, grammar=grammar)
    sink: Sink = queue.SimpleQueue()
    pipeline.submit_many([(prompt, free if index else kept) for index, prompt in enumerate(prompts)], sink=sink)
    times: dict[int, list[float]] = {index: [] for index in range(len(prompts))}
    open_streams = set(times)
    while open_streams:
        index, message = sink.get()
        if isinstance(message, VRAMancerError):
            raise message
        times[index] += [time.perf_counter()] * sum(len(delta.token_ids) for delta in message.deltas)
        if message.finished:
            open_streams.discard(index)
    if any(len(each) != tokens for each in times.values()):
        raise SystemExit("a stream ended before its time")
    begin, end = max(each[0] for each in times.values()), min(each[-1] for each in times.values())
    gaps = [after - before for before, after in itertools.pairwise(times[len(prompts) - 1]) if begin <= before < end]
    return statistics.fmean(gaps)


def main(argv: list[str] | None = None) -> int:
    """Run the pairs; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="443m", help="443m, small, or a folder with a checkpoint")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=49)
    parser.add_argument("--device", default="cpu=4GiB")
    parser.add_argument("--workdir", type=Path, default=default_workdir())
    options = parser.parse_args(argv)
    if options.pairs < LEAST_PAIRS:
        parser.error(f"fewer than {LEAST_PAIRS} pairs have no 95 % interval")
    model = resolve_model(options.model, options.workdir)
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    given = {"model.name": str(model), "devices.devices": options.device, "engine.max_batch_size": options.streams}
    pipeline = InferencePipeline(load_settings(config_file=None, environ={}, overrides=given))
    grammar = forms.compose(forms.json_schema(SCHEMA))
    ratios: list[float] = []
    plain_s: list[float] = []
    try:
        pipeline.load()
        for pair in range(-1, options.pairs):  # the first warms up
            prompts = random_prompts(options.streams, 16, vocab_size, seed=pair + 2)
            order = (None, grammar) if pair % 2 else (grammar, None)
            found = {each: step_s(pipeline, prompts, options.new_tokens, each) for each in order}
            if pair < 0:
                continue
            ratios.append(found[grammar] / found[None])
            plain_s.append(found[None])
            said = f"{found[grammar] * 1e3:.2f} / {found[None] * 1e3:.2f} ms a step"
            print(f"pair {pair + 1}: {said}", file=sys.stderr)
    finally:
        pipeline.shutdown()
    low, high = interval(ratios)
    print(f"{machine_info()['cpu']}, {usable_cores()} threads, {options.model}, one of {options.streams} streams")
    print(
        f"a step with it takes {statistics.median(ratios):.4f} (95 %: {low:.4f} to {high:.4f}) of one without, in "
        f"{len(ratios)} pairs; without: {statistics.median(plain_s) * 1e3:.1f} ms"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
