"""Compare VRAMancer with other engines on the same weights, prompts and threads.

    python -m benchmarks.run --model 443m --streams 1,16 --repeats 5 --json result.json

Every engine lives in its own process; the processes take turns, round after round, so that a machine whose speed
drifts slows all of them alike. What counts is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.machine import LoadMeter, machine_info, usable_cores, wait_until_quiet
from benchmarks.models import default_workdir, random_prompts, resolve_model
from benchmarks.peers import DEFAULT_PEERS, PEERS
from benchmarks.peers.base import PeerUnavailable, RunResult
from benchmarks.report import Series, as_json, print_machine, streams_table
from benchmarks.worker import Worker, WorkerError, stop_on_sigterm


def comma_list(text: str) -> list[str]:
    """Split ``a,b``; empty parts are dropped."""
    return [part.strip() for part in text.split(",") if part.strip()]


def positive(text: str) -> int:
    """An integer of at least one."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def positives(text: str) -> list[int]:
    """``1,16`` as numbers."""
    return [positive(part) for part in comma_list(text)]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default="443m", help="443m, small, or a folder with a Hugging Face checkpoint")
    parser.add_argument("--streams", type=positives, default="1,16", help="numbers of concurrent requests to measure")
    parser.add_argument("--prompt-tokens", type=positive, default=128, help="tokens in each prompt")
    parser.add_argument("--new-tokens", type=positive, default=33, help="tokens generated for each request")
    parser.add_argument("--peers", default=",".join(DEFAULT_PEERS), help=f"engines, of {', '.join(PEERS)}")
    parser.add_argument("--baseline", default="ours", help="the engine the others are compared with")
    parser.add_argument("--repeats", type=positive, default=5, help="rounds; the median over them is reported")
    parser.add_argument("--threads", type=positive, default=usable_cores(), help="compute threads of every engine")
    parser.add_argument(
        "--wait-quiet", type=float, default=0.0, metavar="S", help="wait up to S seconds for a quiet machine every time"
    )
    parser.add_argument("--workdir", type=Path, default=default_workdir(), help="models, converted weights and logs")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    return parser


def start_workers(
    names: list[str], model_dir: Path, arguments: argparse.Namespace, max_streams: int, console: Console
) -> tuple[dict[str, Worker], dict[str, Any]]:
    """Load the engines one after another; one that cannot run here is named and left out."""
    workers: dict[str, Worker] = {}
    info: dict[str, Any] = {}
    for name in names:
        worker = Worker(name, arguments.threads, arguments.workdir / "logs")
        try:
            with console.status(f"loading {name}"):
                info[name] = worker.load(
                    model_dir,
                    threads=arguments.threads,
                    max_streams=max_streams,
                    max_context=arguments.prompt_tokens + arguments.new_tokens,
                )
        except PeerUnavailable as reason:
            console.print(f"[yellow]{name}: skipped, {reason}[/]", highlight=False)
            info[name] = {"skipped": str(reason)}
            worker.close()
        except WorkerError as error:
            console.print(f"[red]{error}[/]", highlight=False)
            info[name] = {"failed": str(error)}
            worker.close()
        else:
            console.print(f"{name}: {', '.join(f'{k} {v}' for k, v in info[name].items())}", highlight=False)
            workers[name] = worker
    return workers, info


def check_complete(name: str, result: RunResult, max_tokens: int) -> None:
    """Raise unless every request got all its tokens, each with its time."""
    for i, request in enumerate(result.requests):
        if len(request.token_ids) != max_tokens or len(request.times_s) != max_tokens:
            raise WorkerError(
                f"{name}: request {i} has {len(request.token_ids)} tokens and {len(request.times_s)} times, "
                f"not {max_tokens}"
            )


def measure(
    workers: dict[str, Worker], streams: list[int], vocab_size: int, arguments: argparse.Namespace, console: Console
) -> Iterator[list[Series]]:
    """Warm everything up, then go round; every round starts with another engine and brings new prompts.

    Yields everything measured so far after each round.
    """
    names = list(workers)
    series = {(name, count): Series(name, count) for count in streams for name in names}
    for name in names:
        with console.status(f"warming up {name}"):
            for count in streams:
                workers[name].run(random_prompts(count, 16, vocab_size, seed=count), 3)
    for round_number in range(arguments.repeats):
        first = round_number % len(names)
        for count in streams:
            # New prompts every time: an engine that keeps prefixes must not find this one among them.
            seed = 1_000_003 * (round_number + 1) + count
            prompts = random_prompts(count, arguments.prompt_tokens, vocab_size, seed=seed)
            for name in names[first:] + names[:first]:
                label = f"round {round_number + 1}/{arguments.repeats}, {count} streams, {name}"
                with console.status(label):
                    wait_until_quiet(arguments.wait_quiet)
                    meter = LoadMeter()
                    result, cpu_s = workers[name].run(prompts, arguments.new_tokens)
                    others = meter.others_share(cpu_s)
                check_complete(name, result, arguments.new_tokens)
                summary = series[name, count].add(result, count * arguments.prompt_tokens, others)
                console.print(
                    f"[dim]{label}: {summary.output_tok_s:.1f} tok/s, others {others:.0%}[/]", highlight=False
                )
        yield [series[name, count] for count in streams for name in names]


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; returns the exit status."""
    stop_on_sigterm()
    parser = build_parser()
    arguments = parser.parse_args(argv)
    names = comma_list(arguments.peers)
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        parser.error(f"unknown engine {unknown[0]!r}; there are {', '.join(PEERS)}")
    streams: list[int] = arguments.streams
    progress, console = Console(stderr=True), Console(width=None if sys.stdout.isatty() else 140)
    with progress.status(f"preparing {arguments.model}"):
        model_dir = resolve_model(arguments.model, arguments.workdir)
    vocab_size = json.loads((model_dir / "config.json").read_text())["vocab_size"]
    machine = machine_info()
    print_machine(console, machine, arguments.threads)
    workers, info = start_workers(names, model_dir, arguments, max(streams), progress)
    if not workers:
        progress.print("[red]no engine to measure[/]")
        return 1
    baseline = arguments.baseline if arguments.baseline in workers else next(iter(workers))
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    all_series: list[Series] = []
    try:
        for all_series in measure(workers, streams, vocab_size, arguments, progress):
            if arguments.json:
                data = as_json(all_series, baseline, machine, settings, info)
                arguments.json.write_text(json.dumps(data, indent=2) + "\n")
    except WorkerError as error:
        progress.print(f"[red]{error}[/]", highlight=False)
        return 1
    finally:
        for worker in workers.values():
            worker.close()
    for count in streams:
        console.print(streams_table(all_series, count, baseline))
    console.print(
        f"gain: how many times better {baseline} is than that engine (above 1, {baseline} is better), median of the "
        f"ratios within a round; same tokens: share of the output that equals {baseline}'s; others: CPU used by other "
        "processes meanwhile",
        style="dim",
        highlight=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
