"""This checkout beside another one: both serve the same weights in turn, and the ratio of each pair is what counts.

    git worktree add /tmp/before COMMIT
    python -m benchmarks.pairs --before /tmp/before --streams 1,16 --pairs 20
    python -m benchmarks.pairs --before /tmp/before --streams 1,8,32 --setup cores --prompt-tokens 32
    python -m benchmarks.pairs --before /tmp/before --streams 1,8,32 --setup emulated --prompt-tokens 32

`cores` are two stages of this processor, one core each; `emulated` two cards that do not match (`benchmarks.emulated`).

The machine's speed drifts, and what is left of that in a pair goes either way, so the median and its 95 % interval
(by order statistics, which assume nothing of the distribution) say whether one is slower.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.emulated import LINK, device_list, needed_bytes
from benchmarks.machine import machine_info, usable_cores
from benchmarks.models import default_workdir, random_prompts, resolve_model
from benchmarks.run import check_complete, comma_list
from benchmarks.worker import Worker, stop_on_sigterm

LEAST_PAIRS = 6
PAIRS_PER_PROCESS = 4
"""After so many, both engines are loaded anew: where a process finds its memory changes its speed by some percent."""


def settings_of(setup: str, streams: int, context: int) -> dict[str, Any]:
    """What the engine is told beside the defaults of benchmarks, on this processor as a whole, or another setup."""
    if setup == "cpu":
        return {}
    planned = {"devices.plan_streams": streams, "devices.plan_context": context}
    if setup == "cores":
        return planned | {"devices.devices": "cpu=4GiB,cpu=4GiB", "devices.layers": "11,11", "devices.cpu_threads": 1}
    cards = device_list(("3090", "5070 Ti"), int(1.5 * needed_bytes(streams, context)))
    return planned | {"devices.devices": cards, "devices.sim_link": LINK}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the median: the order statistics between which it lies with that probability or more."""
    ordered, count = sorted(values), len(values)
    tail, below = 0.0, 0
    while below < count // 2:
        tail += math.comb(count, below) / 2**count
        if tail > 0.025:
            break
        below += 1
    rank = max(0, below - 1)
    return ordered[rank], ordered[-1 - rank]


def rate(worker: Worker, prompts: list[list[int]], max_tokens: int) -> float:
    """Tokens per second of one run, prompts included in its time."""
    result, _ = worker.run(prompts, max_tokens)
    check_complete(worker.peer, result, max_tokens)
    return len(prompts) * max_tokens / result.wall_s


def main(argv: list[str] | None = None) -> int:
    """Run the pairs; returns the exit status."""
    stop_on_sigterm()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a checkout of what to compare with")
    parser.add_argument("--model", help="443m, small, stages (that of emulated cards), or a folder with a checkpoint")
    parser.add_argument("--setup", choices=("cpu", "cores", "emulated"), default="cpu")
    parser.add_argument("--streams", default="1,16", help="numbers of concurrent requests")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=33)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--workdir", type=Path, default=default_workdir())
    options = parser.parse_args(argv)
    if options.pairs < LEAST_PAIRS:
        parser.error(f"fewer than {LEAST_PAIRS} pairs have no 95 % interval")
    streams = [int(count) for count in comma_list(options.streams)]
    name = options.model or ("stages" if options.setup == "emulated" else "443m")
    model, context = resolve_model(name, options.workdir), options.prompt_tokens + options.new_tokens
    settings = settings_of(options.setup, max(streams), context)
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    ratios: dict[int, list[float]] = {count: [] for count in streams}
    rates: dict[int, list[float]] = {count: [] for count in streams}
    with ExitStack() as opened:
        workers: list[Worker] = []
        for pair in range(options.pairs):
            if pair % PAIRS_PER_PROCESS == 0:
                opened.close()
                # The one that is loaded second finds its memory beside the other's: each comes first in turn.
                turn = pair // PAIRS_PER_PROCESS % 2
                places = (None, options.before)
                loaded: dict[Path | None, Worker] = {}
                for place in places[::-1] if turn else places:
                    worker = loaded[place] = Worker("ours", options.threads, options.workdir / "logs", place)
                    opened.callback(worker.close)
                    worker.load(model, options.threads, max(streams), context, settings=settings)
                    for count in streams:
                        worker.run(random_prompts(count, 16, vocab_size, seed=count), 3)
                workers = [loaded[place] for place in places]
            for count in streams:
                prompts = random_prompts(count, options.prompt_tokens, vocab_size, seed=1000 * (pair + 1) + count)
                order = workers if pair % 2 == 0 else workers[::-1]
                found = {id(worker): rate(worker, prompts, options.new_tokens) for worker in order}
                now, before = (found[id(worker)] for worker in workers)
                ratios[count].append(now / before)
                rates[count].append(now)
                print(f"pair {pair + 1}, {count} streams: {now:.1f} / {before:.1f} tok/s", file=sys.stderr)
    print(
        f"{machine_info()['cpu']}, {options.threads} threads, {name}, {options.setup}; above 1 this checkout is faster"
    )
    for count in streams:
        low, high = interval(ratios[count])
        print(
            f"{count} streams: median {statistics.median(ratios[count]):.3f} (95 %: {low:.3f} to {high:.3f}) of "
            f"{len(ratios[count])} pairs; this checkout {statistics.median(rates[count]):.1f} tok/s in the median"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
