"""What HTTP costs: the same requests over the server's streaming API and straight into the engine.

    python -m benchmarks.http --model 443m --streams 32 --repeats 5

The real server (``python -m vramancer.main --api``) runs in one process and a bare engine in another; they take turns,
round after round, and the median over rounds of the ratio of their output rates is reported.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.machine import LoadMeter, machine_info, usable_cores
from benchmarks.models import default_workdir, random_prompts, resolve_model
from benchmarks.peers.base import PeerUnavailable
from benchmarks.peers.ours import engine_overrides
from benchmarks.report import print_machine
from benchmarks.server import HOST, Server, running_server
from benchmarks.sse_client import HttpError, run_streams
from benchmarks.worker import THREAD_VARIABLES, Worker, WorkerError, stop_on_sigterm


def server_settings(arguments: argparse.Namespace, model_dir: Path) -> dict[str, str]:
    """The server's settings, the same as the bare engine's."""
    context = arguments.prompt_tokens + arguments.new_tokens
    settings = engine_overrides(model_dir, arguments.threads, arguments.streams, context)
    variables = {"VRM_" + key.replace(".", "_").upper(): str(value) for key, value in settings.items()}
    threads = dict.fromkeys(THREAD_VARIABLES, str(arguments.threads)) | {"TOKENIZERS_PARALLELISM": "false"}
    return threads | variables | {"VRM_API_THREADS": str(max(64, arguments.streams + 8))}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.http",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default="443m", help="443m, small, or a folder with a Hugging Face checkpoint")
    parser.add_argument("--streams", type=int, default=32, help="concurrent requests")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="tokens in each prompt")
    parser.add_argument("--new-tokens", type=int, default=33, help="tokens generated for each request")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; the median over them is reported")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="compute threads")
    parser.add_argument("--workdir", type=Path, default=default_workdir(), help="models and logs")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    return parser


def http_rate(server: Server, prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
    """Output tokens per second, and mean time to the first streamed chunk, over HTTP."""
    wall_s, answers = run_streams(HOST, server.port, server.token, server.model, prompts, new_tokens)
    for answer in answers:
        if answer.completion_tokens != new_tokens:
            raise WorkerError(f"the server generated {answer.completion_tokens} tokens, not {new_tokens}")
    return len(prompts) * new_tokens / wall_s, statistics.fmean(answer.chunk_times_s[0] for answer in answers)


def direct_rate(worker: Worker, prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
    """Output tokens per second, and mean time to first token, straight from the engine."""
    result, _ = worker.run(prompts, new_tokens)
    first_s = statistics.fmean(request.ttft_s for request in result.requests)
    return len(prompts) * new_tokens / result.wall_s, first_s


def measure(
    server: Server, worker: Worker, arguments: argparse.Namespace, vocab_size: int, progress: Console
) -> list[dict[str, float]]:
    """Alternate between the two; who goes first alternates too."""
    rounds = []
    for number in range(-1, arguments.repeats):
        seed = 1_000_003 * (number + 2)
        prompts = random_prompts(arguments.streams, arguments.prompt_tokens, vocab_size, seed=seed)
        record: dict[str, float] = {}
        order = ("http", "direct") if number % 2 else ("direct", "http")
        with progress.status("warming up" if number < 0 else f"round {number + 1}/{arguments.repeats}"):
            meter = LoadMeter()
            for way in order:
                if way == "http":
                    record["http_tok_s"], record["http_ttft_s"] = http_rate(server, prompts, arguments.new_tokens)
                else:
                    rate = direct_rate(worker, prompts, arguments.new_tokens)
                    record["direct_tok_s"], record["direct_ttft_s"] = rate
            record["busy_share"] = meter.others_share(own_cpu_s=0.0)
        if number >= 0:
            rounds.append(record)
            rates = f"http {record['http_tok_s']:.1f}, direct {record['direct_tok_s']:.1f} tok/s"
            progress.print(f"[dim]round {number + 1}: {rates}[/]", highlight=False)
    return rounds


def report(rounds: list[dict[str, float]], arguments: argparse.Namespace, console: Console) -> float:
    """Print the table; returns the ratio of the output rates."""
    ratio = statistics.median(r["http_tok_s"] / r["direct_tok_s"] for r in rounds)
    title = f"{arguments.streams} streams of {arguments.prompt_tokens}+{arguments.new_tokens} tokens"
    table = Table(title=f"{title}, median of {len(rounds)} rounds", title_justify="left")
    for column in ("", "output tok/s", "TTFT ms"):
        table.add_column(column, justify="right" if column else "left")
    for way in ("http", "direct"):
        rate, first_s = (statistics.median(r[f"{way}_{what}"] for r in rounds) for what in ("tok_s", "ttft_s"))
        table.add_row(way, f"{rate:.1f}", f"{first_s * 1e3:.1f}")
    console.print(table)
    console.print(f"over HTTP: {ratio:.1%} of the engine's own output rate", highlight=False)
    return ratio


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; returns the exit status."""
    stop_on_sigterm()
    arguments = build_parser().parse_args(argv)
    progress, console = Console(stderr=True), Console()
    with progress.status(f"preparing {arguments.model}"):
        model_dir = resolve_model(arguments.model, arguments.workdir)
    vocab_size = json.loads((model_dir / "config.json").read_text())["vocab_size"]
    print_machine(console, machine_info(), arguments.threads)
    context = arguments.prompt_tokens + arguments.new_tokens
    worker = Worker("ours", arguments.threads, arguments.workdir / "logs")
    try:
        with progress.status("loading the engine"):
            worker.load(model_dir, threads=arguments.threads, max_streams=arguments.streams, max_context=context)
        with contextlib.ExitStack() as stack:
            log_path = arguments.workdir / "logs" / f"server-{os.getpid()}.log"
            with progress.status("starting the server"):
                server = stack.enter_context(running_server(server_settings(arguments, model_dir), log_path))
            rounds = measure(server, worker, arguments, vocab_size, progress)
    except (PeerUnavailable, WorkerError, HttpError) as error:
        progress.print(f"[red]{error}[/]", highlight=False)
        return 1
    finally:
        worker.close()
    ratio = report(rounds, arguments, console)
    if arguments.json:
        arguments.json.write_text(json.dumps({"rounds": rounds, "median_ratio": ratio}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
