"""Two machines and the network between them: network namespaces on this machine, with links as slow as one likes.

    python -m benchmarks.networks [--part finding links overlap growing]

Needs root, for namespaces. `finding`: how long a worker looks for its master, by mDNS alone and by broadcast alone, and
how long it takes from its start to tokens that it helped to make. `links`: decoding over a cut, with the activations of
a 14B model, over 1, 2.5 and 10 Gbit/s, beside what was predicted of the link as it was measured when the worker joined.
`overlap`: the same layers on two machines with several steps in flight and with one. `growing`: a machine that joins
while streams run, the model that moves onto it, and how long streams stand still meanwhile. Devices are emulated in the
last three: they compute for real, and wait until a roofline's time has passed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.emulated import CARDS, SCALE, measure, needed_bytes
from benchmarks.machine import machine_info, usable_cores
from benchmarks.models import SHAPES, default_workdir, random_prompts, resolve_model
from benchmarks.namespaces import Machine, Network, lacking
from benchmarks.report import print_machine
from core.batching.output import RequestHandle
from core.cluster.master import Master
from core.cluster.worker import Worker
from core.config import ClusterSettings, Settings, load_settings
from core.devices import open_devices
from core.inference_pipeline import InferencePipeline
from core.network.handshake import derive_key
from core.request import SamplingParams

VERSION, TOKEN = "0", "only for this measurement"
PARTS = ("finding", "links", "overlap", "growing")
HOLD_MDNS = "import socket; s = socket.socket(2, 2); s.bind(('', 5353)); print(flush=True); input()"
LOOK = (
    "import sys, time; from core.network.discovery import masters; began = time.perf_counter();"
    "found = next(masters(int(sys.argv[1]), 30.0)); print(found.how, time.perf_counter() - began)"
)
LINKS_MBIT_S = (1000.0, 2500.0, 10000.0)
WIDE_CARD = "sim=1GiB@2GB/s/400GFLOPS"
WIDE_STREAMS, WIDE_CONTEXT = (1, 32, 128), 64
PAIR, PAIR_STREAMS, PAIR_CONTEXT = ("3090", "5070 Ti"), (8, 32), 1600
GROWN_FROM, GROWN_BY, GROWING_STREAMS, GROWING_TOKENS = ("3060", "2060"), "4090", 16, 900
PATIENCE_S = 120.0
ROOT = Path(__file__).parents[1]


def wait(condition: Callable[[], bool], what: str) -> None:
    """Look again and again."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"waited in vain for {what}")
        time.sleep(0.002)


def run_worker(given: dict[str, Any]) -> None:
    """Until standard input ends. Prints a line when it begins to look for its master."""
    keeps, lends = given.get("keeps"), given.get("lends", 0)
    settings = Settings.model_validate(
        {
            "devices": {"devices": given["devices"], "cpu_threads": 1}, "runtime": {"cache_dir": given["cache"]},
            "memory": {"host_bytes": keeps}, "cluster": {
                "master": given["master"], "worker_port": 0, "memory_bytes": lends,
            },
        }
    )  # fmt: skip
    worker = Worker(settings, open_devices(settings.devices), derive_key(TOKEN), version=VERSION, name="desk")

    def end_with_input() -> None:
        sys.stdin.read()
        worker.stop()

    threading.Thread(target=end_with_input, daemon=True).start()
    worker.run()
    worker.close()


@contextmanager
def started_master(network: Network) -> Iterator[Master]:
    master = Master(ClusterSettings(port=0), derive_key(TOKEN), version=VERSION, host=network.address, name="master")
    master.start()
    try:
        yield master
    finally:
        master.close()


@contextmanager
def started_worker(machine: Machine, master: Master, devices: str, cache: Path, **offers: int) -> Iterator[None]:
    """On another machine; it has joined. It `keeps` and `lends` so many bytes of main memory."""
    host, port = master.address
    given = {"master": f"{host}:{port}", "devices": devices, "cache": str(cache), **offers}
    command = machine.command(sys.executable, "-m", "benchmarks.networks", "--worker", json.dumps(given))
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE) as process:
        try:
            wait(lambda: len(master.nodes) == 1, "the worker")
            yield
        finally:
            assert process.stdin is not None
            process.stdin.close()


# -- finding ----------------------------------------------------------------------------------------------------------


def look(machine: Machine, port: int) -> tuple[str, float]:
    """How a master was found from there, and after how many seconds."""
    command = machine.command(sys.executable, "-c", LOOK, str(port))
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    how, seconds = said.splitlines()[-1].split()
    return how, float(seconds)


def finding(options: argparse.Namespace, console: Console) -> None:
    table = Table(title="Finding the master, and what follows")
    for name in ("", "times", "median", "longest"):
        table.add_column(name, justify="left" if not name else "right")
    found: dict[str, list[float]] = {}
    for _ in range(options.times):
        with Network() as network, started_master(network) as master:
            quiet, held = network.add(), network.add()
            quiet.without_broadcasts()
            keeper = subprocess.Popen(
                held.command(sys.executable, "-c", HOLD_MDNS), stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            with keeper:
                assert keeper.stdout is not None
                keeper.stdout.readline()
                for machine in (quiet, held):
                    how, seconds = look(machine, master.address[1])
                    found.setdefault(f"found by {how}", []).append(seconds)
                keeper.communicate(b"\n")
            for what, seconds in joining(network, master, options).items():
                found.setdefault(what, []).append(seconds)
    for what, taken in found.items():
        table.add_row(what, str(len(taken)), f"{statistics.median(taken):.2f} s", f"{max(taken):.2f} s")
    console.print(table)


def joining(network: Network, master: Master, options: argparse.Namespace) -> dict[str, float]:
    """From a worker's start to a token that it helped to make."""
    small = str(resolve_model("small", options.workdir))
    settings = Settings.model_validate(
        {
            "model": {"name": small},
            "devices": {"devices": "cpu=1GiB", "cpu_threads": 1, "profile_seconds": 0.1},
            "engine": {"kv_cache_tokens": 8192},
            "runtime": {"cache_dir": str(options.cache_dir)},
        }
    )
    pipeline = InferencePipeline(settings, cluster=master)
    pipeline.load()
    try:
        began_s = time.perf_counter()
        with started_worker(network.add(), master, "cpu=1GiB", options.cache_dir):
            joined_s = time.perf_counter()
            pipeline.place(devices="cpu=1GiB,desk/cpu", placement="balanced")
            placed_s = time.perf_counter()
            prompt = random_prompts(1, 16, SHAPES["small"].vocab, 1)[0]
            pipeline.submit(prompt, SamplingParams(max_tokens=1)).result(PATIENCE_S)
            ended_s = time.perf_counter()
    finally:
        pipeline.shutdown()
    return {
        "from its start until it has joined, Python and torch included": joined_s - began_s,
        "from then until it serves: measured, its layers read": placed_s - joined_s,
        "first token": ended_s - placed_s,
    }


# -- speeds -----------------------------------------------------------------------------------------------------------


@contextmanager
def served(master: Master, options: argparse.Namespace, **settings: Any) -> Iterator[InferencePipeline]:
    """`settings` as "section.key"."""
    always = {
        "devices.cpu_threads": 1, "devices.placement": "balanced", "engine.max_num_batched_tokens": 512,
        "runtime.cache_dir": str(options.cache_dir),
    }  # fmt: skip
    pipeline = InferencePipeline(load_settings(overrides=always | settings), cluster=master)
    try:
        pipeline.load()
        yield pipeline
    finally:
        pipeline.shutdown()


def links(options: argparse.Namespace, console: Console) -> None:
    table = Table(title="Decoding over a cut, hidden size 5120")
    for name in ("link", "measured link", "streams", "in flight", "bytes a step", "tok/s", "predicted", "error"):
        table.add_column(name, justify="right")
    model = resolve_model("wide", options.workdir)
    most = max(WIDE_STREAMS)
    with Network() as network:
        machine = network.add()
        for megabits in LINKS_MBIT_S:
            machine.shape(megabits)
            with started_master(network) as master, started_worker(machine, master, WIDE_CARD, options.cache_dir):
                speed = master.nodes[0].speed
                with served(
                    master, options, **{
                        "model.name": str(model), "devices.devices": f"{WIDE_CARD},desk/sim",
                        "devices.plan_streams": most, "devices.plan_context": WIDE_CONTEXT,
                        "engine.max_batch_size": most, "engine.kv_cache_tokens": most * (WIDE_CONTEXT + 1000),
                    }
                ) as pipeline:  # fmt: skip
                    for streams in WIDE_STREAMS:
                        rate = measure(pipeline, streams, WIDE_CONTEXT, options.seconds, vocab=SHAPES["wide"].vocab)
                        table.add_row(
                            f"{megabits / 1000:g} Gbit/s",
                            f"{speed.bandwidth_bytes_s * 8 / 1e9:.2f} Gbit/s, {speed.latency_s * 1e6:.0f} us",
                            str(streams), str(rate.cohorts), f"{streams * 10240 // rate.cohorts:,}",
                            f"{rate.tok_s:.1f}", f"{rate.predicted_tok_s:.1f}", f"{rate.error:+.1%}",
                        )  # fmt: skip
    console.print(table)


def overlap(options: argparse.Namespace, console: Console) -> None:
    table = Table(title=f"{' + '.join(PAIR)}, emulated, on two machines with 1 Gbit/s between them")
    for name in ("streams", "in flight", "tok/s", "one at a time", "ratio", "error of the prediction"):
        table.add_column(name, justify="right")
    model = str(resolve_model("stages", options.workdir))
    most = max(PAIR_STREAMS)
    room = int(0.75 * needed_bytes(most, PAIR_CONTEXT))
    here, there = (card(name, room) for name in PAIR)
    found: dict[int, list[Any]] = {streams: [] for streams in PAIR_STREAMS}
    with Network() as network:
        machine = network.add()
        machine.shape(1000.0)
        with started_master(network) as master, started_worker(machine, master, there, options.cache_dir):
            settings = {
                "model.name": model, "devices.devices": f"{here},desk/sim", "devices.plan_streams": most,
                "devices.plan_context": PAIR_CONTEXT, "engine.max_batch_size": most,
                "engine.kv_cache_tokens": most * (PAIR_CONTEXT + 1000),
            }  # fmt: skip
            for more in ({}, {"engine.cohorts": 1}):
                with served(master, options, **settings, **more) as pipeline:
                    for streams in PAIR_STREAMS:
                        found[streams].append(measure(pipeline, streams, PAIR_CONTEXT, options.seconds))
    for streams, (several, alone) in found.items():
        table.add_row(
            str(streams), str(several.cohorts), f"{several.tok_s:.2f}", f"{alone.tok_s:.2f}",
            f"{several.tok_s / alone.tok_s:.2f}", f"{several.error:+.1%}, one at a time {alone.error:+.1%}",
        )  # fmt: skip
    console.print(table)


class Streams:
    """So many that run; when each of their tokens came."""

    def __init__(self, pipeline: InferencePipeline, prompts: Sequence[list[int]], tokens: int) -> None:
        self.times_s: list[list[float]] = [[] for _ in prompts]
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        self._handles = [pipeline.submit(prompt, params) for prompt in prompts]
        self._threads = [
            threading.Thread(target=self._read, args=(number, handle)) for number, handle in enumerate(self._handles)
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, number: int, handle: RequestHandle) -> None:
        for output in handle:
            self.times_s[number].extend(time.monotonic() for delta in output.deltas for _ in delta.token_ids)

    def have_begun(self) -> bool:
        """Whether each has a token."""
        return all(self.times_s)

    def rate(self, since_s: float, until_s: float) -> float:
        """Tokens per second."""
        count = sum(since_s <= moment < until_s for times in self.times_s for moment in times)
        return count / (until_s - since_s)

    def longest_gap_s(self, since_s: float) -> float:
        """Of all streams, the longest time between two tokens of which the later one came after `since_s`."""
        gaps = [b - a for times in self.times_s for a, b in itertools.pairwise(times) if b >= since_s]
        return max(gaps)

    def close(self) -> None:
        for handle in self._handles:
            handle.abort()
        for thread in self._threads:
            thread.join()


def card(name: str, room: int) -> str:
    """As an emulated device, scaled down."""
    return f"sim={room}B@{CARDS[name][1] / SCALE / 1e6:g}MB/s/{CARDS[name][2] / SCALE / 1e9:g}GFLOPS"


def growing(options: argparse.Namespace, console: Console) -> None:
    """Of each context length, one row."""
    title = f"{' + '.join(GROWN_FROM)}, then a machine with a {GROWN_BY}, emulated; {GROWING_STREAMS} streams"
    table = Table(title=title)
    for name in ("context", "tok/s before", "after", "ratio", "a step before", "longest gap", "pause", "moved in"):
        table.add_column(name, justify="right")
    model = str(resolve_model("stages", options.workdir))
    for context in (64, 800):
        room = int(1.2 * needed_bytes(GROWING_STREAMS, context))
        with Network() as network, started_master(network) as master:
            settings = {
                "model.name": model, "devices.devices": ",".join(card(name, room) for name in GROWN_FROM),
                "devices.placement": "profiled", "devices.plan_streams": GROWING_STREAMS,
                "devices.plan_context": context, "engine.max_batch_size": GROWING_STREAMS,
                "engine.kv_cache_tokens": GROWING_STREAMS * (context + GROWING_TOKENS + 64),
            }  # fmt: skip
            machine = network.add()
            machine.shape(1000.0)
            with served(master, options, **settings) as pipeline:
                prompts = random_prompts(GROWING_STREAMS, context, SHAPES["stages"].vocab, 3)
                streams = Streams(pipeline, prompts, GROWING_TOKENS)
                try:
                    wait(streams.have_begun, "first tokens")
                    began_s = time.monotonic()
                    time.sleep(options.seconds)
                    ended_s = time.monotonic()
                    before = streams.rate(began_s, ended_s)
                    with started_worker(machine, master, card(GROWN_BY, room), options.cache_dir):
                        asked_s = time.monotonic()
                        both = [*(card(name, room) for name in GROWN_FROM), "desk/sim"]
                        moved = pipeline.place(devices=",".join(both), placement="profiled")
                        moved_s = time.monotonic()
                        time.sleep(1.0)
                        settled_s = time.monotonic()
                        time.sleep(options.seconds)
                        after = streams.rate(settled_s, time.monotonic())
                        gap_s = streams.longest_gap_s(asked_s)
                        streams.close()
                        pipeline.place(devices=",".join(both[:-1]))
                finally:
                    streams.close()
        table.add_row(
            str(context), f"{before:.1f}", f"{after:.1f}", f"{after / before:.2f}",
            f"{GROWING_STREAMS / before * 1e3:.0f} ms", f"{gap_s:.2f} s", f"{moved.pause_seconds or 0.0:.2f} s",
            f"{moved_s - asked_s:.1f} s",
        )  # fmt: skip
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.networks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="which (default: all)")
    parser.add_argument("--times", type=int, default=5, help="that a worker looks and joins (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each rate (default: %(default)s)")
    parser.add_argument("--workdir", type=Path, default=default_workdir(), help="models (default: %(default)s)")
    parser.add_argument(
        "--cache-dir", type=Path, default=Settings().runtime.cache_dir, help="compiled kernels (default: %(default)s)"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # a process that this one starts
    options = parser.parse_args(arguments)
    if options.worker is not None:
        run_worker(json.loads(options.worker))
        return 0
    console = Console(width=140)
    reason = lacking()
    if reason is not None:
        console.print(f"No network namespaces here: {reason}.")
        return 1
    print_machine(console, machine_info(), usable_cores())
    for part in options.part:
        {"finding": finding, "links": links, "overlap": overlap, "growing": growing}[part](options, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
