"""Quantized weights on the CPU beside llama.cpp's types of the same size, and what they cost in perplexity.

    python -m benchmarks.quantized
    python -m benchmarks.quantized --part speed --repeats 5 --streams 1,16
    python -m benchmarks.quantized --part perplexity

Speed: a random 443M-parameter model. Engines take turns as in `benchmarks.run`, and ratios are medians of those within
a round. Q8_0, Q4_0 and Q4_K_M are the very files that llama.cpp serves. int8 and int4 are what `--quantize` makes, with
the output layer in bf16.

Perplexity: the bundled demo model on conversations of its own kind, from a seed that it was not trained with.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.gguf_export import gguf_of
from benchmarks.machine import machine_info
from benchmarks.models import resolve_model
from benchmarks.peers.base import PeerUnavailable
from benchmarks.report import Series, print_machine
from benchmarks.run import build_parser, measure
from benchmarks.stats import median_summary, speedups
from benchmarks.worker import Worker, WorkerError, stop_on_sigterm

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "core" / "models" / "demo"
TEXTS, TEXT_SEED, LONGEST = 200, "perplexity", 1024


@dataclass(frozen=True)
class Engine:
    """A peer by the name that tables have, and what it is told. With `file`, one of `gguf_export.QUANTIZED`, it serves
    the very file that llama.cpp does."""

    peer: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    file: str = ""


ENGINES = {
    "bf16": Engine("ours", {"model.dtype": "bfloat16"}),
    "int8": Engine("ours", {"model.dtype": "bfloat16", "model.quantize": "int8"}),
    "int4": Engine("ours", {"model.dtype": "bfloat16", "model.quantize": "int4"}),
    "Q8_0": Engine("ours", file="q8_0"),
    "Q4_0": Engine("ours", file="q4_0"),
    "Q4_K_M": Engine("ours", file="q4_k_m"),
    "llama.cpp bf16": Engine("llama.cpp"),
    "llama.cpp Q8_0": Engine("llama.cpp-q8_0"),
    "llama.cpp Q4_0": Engine("llama.cpp-q4_0"),
    "llama.cpp Q4_K_M": Engine("llama.cpp-q4_k_m"),
}
PAIRS = (
    ("int8", "bf16"), ("int4", "bf16"), ("Q8_0", "bf16"), ("Q4_0", "bf16"), ("Q4_K_M", "bf16"),
    ("bf16", "llama.cpp bf16"), ("Q8_0", "llama.cpp Q8_0"), ("Q4_0", "llama.cpp Q4_0"), ("Q4_K_M", "llama.cpp Q4_K_M"),
)  # fmt: skip


def chosen(arguments: argparse.Namespace) -> list[str]:
    """Names of engines, all if none were asked for."""
    return [name for name in ENGINES if arguments.engines is None or name in arguments.engines]


def open_engines(
    names: Sequence[str], model_dir: Path, arguments: argparse.Namespace, streams: int, context: int, console: Console
) -> dict[str, Worker]:
    """Load them one after another; one that cannot run here is named and left out."""
    workers: dict[str, Worker] = {}
    for name in names:
        engine = ENGINES[name]
        worker = Worker(engine.peer, arguments.threads, arguments.workdir / "logs")
        extra = {"settings": dict(engine.settings)} if engine.settings else {}
        try:
            with console.status(f"loading {name}"):
                path = model_dir
                if engine.file:
                    path = gguf_of(model_dir, model_dir.parent / "gguf", engine.file, arguments.threads)
                worker.load(path, arguments.threads, streams, context, **extra)
        except PeerUnavailable as reason:
            console.print(f"[yellow]{name}: skipped, {reason}[/]", highlight=False)
            worker.close()
        else:
            workers[name] = worker
    return workers


def speed_table(series: Sequence[Series], streams: int) -> Table:
    """Medians over rounds."""
    table = Table(title=f"{streams} streams", title_justify="left")
    table.add_column("engine")
    for column in ("gap ms", "decode tok/s", "output tok/s", "others"):
        table.add_column(column, justify="right")
    for entry in series:
        if entry.streams == streams:
            m = median_summary(entry.rounds)
            numbers = (m.inter_token_p50_s * 1e3, m.decode_tok_s, m.output_tok_s)
            table.add_row(entry.peer, *(f"{n:.1f}" for n in numbers), f"{statistics.median(entry.others_share):.0%}")
    return table


def ratios_table(series: Sequence[Series], streams: int) -> Table:
    """How many times faster the first of a pair is, within a round."""
    table = Table(title=f"{streams} streams: how many times faster", title_justify="left")
    for column in ("this", "than that"):
        table.add_column(column)
    for column in ("gap", "decode", "all told"):
        table.add_column(column, justify="right")
    found = {entry.peer: entry for entry in series if entry.streams == streams}
    for mine, other in PAIRS:
        if mine in found and other in found:
            gain = speedups(found[mine].rounds, found[other].rounds)
            ratios = (gain.inter_token_p50_s, gain.decode_tok_s, gain.output_tok_s)
            table.add_row(mine, other, *(f"{ratio:.2f}" for ratio in ratios))
    return table


def speed(arguments: argparse.Namespace, progress: Console, console: Console) -> None:
    """Rounds of all engines; tables are printed at the end."""
    model_dir = resolve_model(arguments.model, arguments.workdir)
    vocab_size = json.loads((model_dir / "config.json").read_text())["vocab_size"]
    context = arguments.prompt_tokens + arguments.new_tokens
    workers = open_engines(chosen(arguments), model_dir, arguments, max(arguments.streams), context, progress)
    series: list[Series] = []
    try:
        for so_far in measure(workers, arguments.streams, vocab_size, arguments, progress):
            series = so_far
    finally:
        for worker in workers.values():
            worker.close()
    for streams in arguments.streams:
        console.print(speed_table(series, streams))
        console.print(ratios_table(series, streams))


def unseen_texts(model_dir: Path) -> tuple[list[list[int]], list[list[bool]]]:
    """Token ids of conversations that the demo model was not trained with, and which of them are its own to write."""
    sys.path.insert(0, str(ROOT / "scripts"))
    chat, rng = import_module("demo_corpus").chat, Random(TEXT_SEED)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    texts: list[list[int]] = []
    counted: list[list[bool]] = []
    for _ in range(TEXTS):
        segments = chat(rng)
        parts = [(tokenizer.encode(text, add_special_tokens=False), written) for text, written in segments]
        texts.append([token for tokens, _ in parts for token in tokens][:LONGEST])
        counted.append([written for tokens, written in parts for _ in tokens][:LONGEST])
    return texts, counted


def perplexity(arguments: argparse.Namespace, progress: Console, console: Console) -> None:
    """One engine after another."""
    texts, counted = unseen_texts(DEMO)
    model_dir = arguments.workdir / "demo"  # where GGUF files can lie beside it
    shutil.copytree(DEMO, model_dir, dirs_exist_ok=True)
    table = Table(title="perplexity of the demo model", title_justify="left")
    for column in ("engine", "perplexity", "to bf16"):
        table.add_column(column, justify="right" if column != "engine" else "left")
    first: float | None = None
    for name in chosen(arguments):
        workers = open_engines([name], model_dir, arguments, 1, LONGEST + 8, progress)
        for worker in workers.values():
            try:
                with progress.status(f"scoring by {name}"):
                    score = worker.score(texts, counted)
            finally:
                worker.close()
            found = math.exp(-score.log_probability / score.tokens)
            first = first or found
            table.add_row(name, f"{found:.4f}", f"{found / first - 1:+.2%}")
    console.print(table)
    console.print(
        f"{len(texts)} texts, of whose {sum(map(len, texts))} tokens {sum(map(sum, counted))} count", highlight=False
    )


def main(argv: list[str] | None = None) -> int:
    """Run the parts; returns the exit status."""
    stop_on_sigterm()
    parser = build_parser()
    parser.prog, parser.description = "python -m benchmarks.quantized", (__doc__ or "").splitlines()[0]
    parser.add_argument("--part", choices=("speed", "perplexity"), help="one alone")
    parser.add_argument("--engines", type=lambda text: text.split(";"), help="names as in tables, separated by ;")
    arguments = parser.parse_args(argv)
    progress, console = Console(stderr=True), Console(width=None if sys.stdout.isatty() else 140)
    print_machine(console, machine_info(), arguments.threads)
    parts = {"speed": speed, "perplexity": perplexity}
    try:
        for name in [arguments.part] if arguments.part else parts:
            parts[name](arguments, progress, console)
    except WorkerError as error:
        progress.print(f"[red]{error}[/]", highlight=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
