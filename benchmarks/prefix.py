"""How much sooner the first token comes when the engine has seen the prompt's beginning before.

    python -m benchmarks.prefix --model 443m --prefix-tokens 1000 --repeats 5

Each round takes a new random prefix, asks once with one suffix (cold) and again with another (warm), and compares the
two times to first token. VRAMancer only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine_info, usable_cores
from benchmarks.models import default_workdir, random_prompts, resolve_model
from benchmarks.peers.base import PeerUnavailable
from benchmarks.report import print_machine
from benchmarks.worker import Worker, WorkerError, stop_on_sigterm


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prefix",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default="443m", help="443m, small, or a folder with a Hugging Face checkpoint")
    parser.add_argument("--prefix-tokens", type=int, default=1000, help="tokens that the two prompts share")
    parser.add_argument("--suffix-tokens", type=int, default=16, help="tokens after them, different each time")
    parser.add_argument("--new-tokens", type=int, default=4, help="tokens generated for each request")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; the median over them is reported")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="compute threads")
    parser.add_argument("--workdir", type=Path, default=default_workdir(), help="models and logs")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    return parser


def measure_round(worker: Worker, arguments: argparse.Namespace, vocab_size: int, seed: int) -> tuple[float, float]:
    """Cold and warm time to first token, in seconds."""
    prefix = random_prompts(1, arguments.prefix_tokens, vocab_size, seed=seed)[0]
    cold_suffix, warm_suffix = random_prompts(2, arguments.suffix_tokens, vocab_size, seed=seed + 1)
    cold, _ = worker.run([prefix + cold_suffix], arguments.new_tokens)
    warm, _ = worker.run([prefix + warm_suffix], arguments.new_tokens)
    return cold.requests[0].ttft_s, warm.requests[0].ttft_s


def main(argv: list[str] | None = None) -> int:
    """Run the measurement; returns the exit status."""
    stop_on_sigterm()
    arguments = build_parser().parse_args(argv)
    progress, console = Console(stderr=True), Console()
    with progress.status(f"preparing {arguments.model}"):
        model_dir = resolve_model(arguments.model, arguments.workdir)
    vocab_size = json.loads((model_dir / "config.json").read_text())["vocab_size"]
    print_machine(console, machine_info(), arguments.threads)
    context = arguments.prefix_tokens + arguments.suffix_tokens + arguments.new_tokens
    worker = Worker("ours", arguments.threads, arguments.workdir / "logs")
    rounds: list[tuple[float, float]] = []
    try:
        with progress.status("loading and warming up"):
            worker.load(model_dir, threads=arguments.threads, max_streams=4, max_context=context)
            measure_round(worker, arguments, vocab_size, seed=1)
        for number in range(arguments.repeats):
            with progress.status(f"round {number + 1}/{arguments.repeats}"):
                rounds.append(measure_round(worker, arguments, vocab_size, seed=1_000_003 * (number + 1)))
    except (PeerUnavailable, WorkerError) as error:
        progress.print(f"[red]{error}[/]", highlight=False)
        return 1
    finally:
        worker.close()
    ratio = statistics.median(cold / warm for cold, warm in rounds)
    shared = f"{arguments.prefix_tokens} tokens shared, {arguments.suffix_tokens} new"
    table = Table(title=f"time to first token, {shared}, median of {len(rounds)} rounds", title_justify="left")
    for column in ("first time ms", "prefix seen before ms", "sooner by"):
        table.add_column(column, justify="right")
    cold_ms, warm_ms = (statistics.median(pair[i] for pair in rounds) * 1e3 for i in (0, 1))
    table.add_row(f"{cold_ms:.1f}", f"{warm_ms:.1f}", f"{ratio:.1f}x")
    console.print(table)
    if arguments.json:
        record = {"cold_s": [r[0] for r in rounds], "warm_s": [r[1] for r in rounds], "median_ratio": ratio}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
