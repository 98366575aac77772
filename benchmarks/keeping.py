"""Time to first token of a long prompt that was seen before, with its KV on several machines.

    python -m benchmarks.keeping --json result.json

Needs root, for network namespaces. Beside computing it anew: `L4`, from main memory that another machine lends, over
links of 1 and 10 Gbit/s; and `parts`, from main memory of the two machines that compute it, half of the layers each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.machine import machine_info, usable_cores
from benchmarks.models import SHAPES, default_workdir, random_prompts, resolve_model
from benchmarks.namespaces import Network, lacking
from benchmarks.networks import served, started_master, started_worker
from benchmarks.report import print_machine
from benchmarks.restore import _first_token_s
from core.config import Settings

MBIT_S = (1000.0, 10000.0)
KINDS = ("L4", "parts")
OFFER = 1 << 28
DEVICE = "cpu=1GiB"
_SUFFIX, _FLUSH_S = 16, 120.0


def measure(options: argparse.Namespace, megabits_s: float, kind: str) -> list[dict[str, Any]]:
    """Each round: the first time, and again with another end once two others have pushed it out."""
    shape, length = SHAPES[options.model], options.prefix_tokens
    head = shape.head or shape.hidden // shape.heads
    prefix_bytes = length * shape.layers * 2 * shape.kv_heads * head * 2
    devices = f"{DEVICE},desk/cpu" if kind == "parts" else DEVICE
    settings = {
        "model.name": str(resolve_model(options.model, options.workdir)), "engine.kv_cache_tokens": length + 256,
        "engine.max_batch_size": 2, "devices.devices": devices,
        "memory.host_bytes": OFFER if kind == "parts" else prefix_bytes * 5 // 4,
    }  # fmt: skip
    offers = {"keeps": OFFER} if kind == "parts" else {"lends": OFFER}
    rounds = []
    with Network() as network:
        machine = network.add()
        machine.shape(megabits_s)
        with (
            started_master(network) as master,
            started_worker(machine, master, DEVICE, options.cache_dir, **offers),
            served(master, options, **settings) as pipeline,
        ):
            tiers = pipeline.engine.memory.tiers
            assert tiers is not None
            _first_token_s(pipeline, random_prompts(1, 64, shape.vocab, 11)[0])
            for number in range(options.repeats):
                prefix, *others = random_prompts(3, length, shape.vocab, 1_003 * (number + 1))
                ends = random_prompts(2, _SUFFIX, shape.vocab, 1_003 * (number + 1) + 1)
                cold_s, _ = _first_token_s(pipeline, prefix + ends[0])
                for other in others:
                    _first_token_s(pipeline, other)
                    tiers.memory.flush(_FLUSH_S)
                warm_s, cached = _first_token_s(pipeline, prefix + ends[1])
                rounds.append({"recomputed_s": cold_s, "restored_s": warm_s, "restored_tokens": cached})
    return rounds


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.keeping", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="small", choices=("small", "443m"), help="what is served, on the CPU")
    parser.add_argument("--prefix-tokens", type=int, default=2000, help="tokens that come back")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=KINDS, help="which (default: all)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the median counts")
    parser.add_argument("--workdir", type=Path, default=default_workdir(), help="where the model is kept")
    parser.add_argument("--cache-dir", type=Path, default=Settings().runtime.cache_dir, help="compiled kernels")
    parser.add_argument("--json", type=Path, help="record everything measured in this file")
    options = parser.parse_args(arguments)
    console = Console(width=140)
    reason = lacking()
    if reason is not None:
        console.print(f"No network namespaces here: {reason}.")
        return 1
    print_machine(console, machine_info(), usable_cores())
    found: dict[str, Any] = {}
    for megabits_s in MBIT_S:
        for kind in options.kind:
            rounds = found[f"{kind}, {megabits_s:g} Mbit/s"] = measure(options, megabits_s, kind)
            cold, warm = (statistics.median(entry[key] for entry in rounds) for key in ("recomputed_s", "restored_s"))
            console.print(
                f"{kind} over {megabits_s:g} Mbit/s: {warm * 1e3:.0f} ms instead of {cold * 1e3:.0f} ms; "
                f"{min(entry['restored_tokens'] for entry in rounds)} tokens or more restored"
            )
    if options.json is not None:
        data = json.loads(options.json.read_text()) if options.json.exists() else {}
        data |= {
            "machine": machine_info(),
            "keeping": {"model": options.model, "tokens": options.prefix_tokens} | found,
        }
        options.json.write_text(json.dumps(data, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
