"""Time to first token of a long prompt: recomputed, restored from main memory, restored from a directory.

    python -m benchmarks.restore --json result.json

Every round takes a new random prefix. The device holds one such prompt: another one pushes the first out, to main
memory (L3) or, where that is small, on to the directory (L5). Asked again, it comes back from there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.machine import machine_info
from benchmarks.models import SHAPES, default_workdir, random_prompts, resolve_model
from core.config import load_settings
from core.inference_pipeline import InferencePipeline
from core.request import SamplingParams

_ONE = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)
_SUFFIX = 16
_SETTLE_S = 2.0
"""For what is written in the background."""


def _first_token_s(pipeline: InferencePipeline, prompt: list[int]) -> tuple[float, int]:
    """Seconds to the only token, and how many tokens of the prompt did not have to be computed."""
    started_s = time.perf_counter()
    result = pipeline.submit(prompt, _ONE).result(600)
    return time.perf_counter() - started_s, result.num_cached_tokens


def measure(model: str, workdir: Path, length: int, repeats: int, disk: Path | None) -> list[dict[str, Any]]:
    """Each round: the first time, pushed out by another prompt, and again with another end.

    With `disk`, the server is started anew before it is asked again, so that only the directory still has the prefix.
    """
    vocab = SHAPES[model].vocab
    settings: dict[str, Any] = {
        "model.name": str(resolve_model(model, workdir)), "engine.kv_cache_tokens": length + 256,
        "engine.max_batch_size": 2, "memory.host_bytes": 1 << 29,
    }  # fmt: skip
    if disk is not None:
        settings |= {
            "memory.disk_path": disk, "memory.disk_bytes": 1 << 30, "memory.disk_min_free_bytes": 0,
            "memory.write_back_bytes_s": None,
        }  # fmt: skip

    def opened() -> InferencePipeline:
        pipeline = InferencePipeline(load_settings(overrides=settings))
        pipeline.load()
        _first_token_s(pipeline, random_prompts(1, 64, vocab, 11)[0])
        return pipeline

    pipeline, rounds = opened(), []
    try:
        for number in range(repeats):
            prefix, other = random_prompts(2, length, vocab, 1_003 * (number + 1))
            ends = random_prompts(2, _SUFFIX, vocab, 1_003 * (number + 1) + 1)
            cold_s, _ = _first_token_s(pipeline, prefix + ends[0])
            _first_token_s(pipeline, other)
            time.sleep(_SETTLE_S)
            if disk is not None:
                pipeline.shutdown()
                pipeline = opened()
            warm_s, cached = _first_token_s(pipeline, prefix + ends[1])
            rounds.append({"recomputed_s": cold_s, "restored_s": warm_s, "restored_tokens": cached})
    finally:
        pipeline.shutdown()
    return rounds


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.restore", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="small", choices=("small", "443m"), help="what is served, on the CPU")
    parser.add_argument("--prefix-tokens", type=int, default=2000, help="tokens that come back")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the median counts")
    parser.add_argument("--workdir", type=Path, default=default_workdir(), help="where the model is kept")
    parser.add_argument("--json", type=Path, help="record everything measured in this file")
    given = parser.parse_args(arguments)
    console, found = Console(width=140), {}
    with tempfile.TemporaryDirectory(prefix="vramancer-kv-") as folder:
        for tier, disk in (("L3", None), ("L5", Path(folder))):
            rounds = measure(given.model, given.workdir, given.prefix_tokens, given.repeats, disk)
            found[tier] = rounds
            ratio = statistics.median(entry["restored_s"] / entry["recomputed_s"] for entry in rounds)
            cold, warm = (statistics.median(entry[key] for entry in rounds) for key in ("recomputed_s", "restored_s"))
            console.print(
                f"{tier}: {warm * 1e3:.0f} ms instead of {cold * 1e3:.0f} ms, {ratio:.2f} of it; "
                f"{min(entry['restored_tokens'] for entry in rounds)} tokens or more restored"
            )
    if given.json is not None:
        data = json.loads(given.json.read_text()) if given.json.exists() else {}
        data |= {"machine": machine_info(), "restore": {"model": given.model, "tokens": given.prefix_tokens} | found}
        given.json.write_text(json.dumps(data, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
