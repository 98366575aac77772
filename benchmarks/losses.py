"""Nodes that are lost while streams run: whether a token changes, and how long streams stand still.

    python -m benchmarks.losses [--losses 100] [--streams 16] [--cost-pairs 20]

A master and two workers, each a process, serve one small model between them. Streams run, half of them greedy, half
seeded; then one worker is lost in one of five ways, the model moves to what is left, and streams go on. Afterwards the
worker comes back and the model with it. Each stream's tokens are compared with those of a run that nothing disturbed.
Then streams run with signs of life and reports between the machines and without, in turn: what being able to notice
costs while nothing is lost.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine_info, usable_cores
from benchmarks.models import default_workdir, resolve_model
from benchmarks.pairs import interval
from benchmarks.relay import Relay
from benchmarks.report import print_machine
from benchmarks.stats import percentile
from core.cluster.master import Master
from core.cluster.worker import Worker
from core.config import ClusterSettings, Settings
from core.devices import open_devices
from core.inference_pipeline import InferencePipeline
from core.network.frames import Opcode
from core.network.handshake import derive_key
from core.network.link import Link
from core.network.watch import SILENCE_S
from core.request import SamplingParams

HOST, VERSION, TOKEN = "127.0.0.1", "0", "only for this measurement"
PLACED = "cpu=1GiB,desk/cpu,attic/cpu"
PROMPT_TOKENS = 24
KINDS = ("killed", "link down", "black hole", "device error", "stopped")
PATIENCE_S = 120.0
LONGEST_SILENCE_S, COST_TOKENS = 60.0, 3900


@dataclass
class Loss:
    """One loss. Seconds from it to the moment when the master knew, and for each stream its longest silence from then
    on."""

    kind: str
    noticed_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    changed: int = 0
    failed: list[str] = field(default_factory=list)


def worker_settings(cache: Path) -> Settings:
    return Settings.model_validate(
        {"devices": {"devices": "cpu=1GiB", "cpu_threads": 1}, "runtime": {"cache_dir": str(cache)}}
    )


def run_worker(given: dict[str, str]) -> None:
    """A worker that fails as a device would, once it is sent SIGUSR1."""
    from core.execution.stage import Stage

    broken = threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: broken.set())
    quiet = keep_quiet()
    signal.signal(signal.SIGUSR2, lambda *_: quiet.clear() if quiet.is_set() else quiet.set())
    original = Stage.run

    def run(self: Stage, step: int) -> None:
        if broken.is_set():
            from core.errors import DeviceLostError

            raise DeviceLostError("the device does not answer", device=self.device.name)
        original(self, step)

    Stage.run = run  # type: ignore[method-assign]
    cluster = ClusterSettings(master=given["master"], worker_port=0, silence_s=float(given["silence"]))
    settings = worker_settings(Path(given["cache"])).model_copy(update={"cluster": cluster})
    worker = Worker(settings, open_devices(settings.devices), derive_key(TOKEN), version=VERSION, name=given["name"])

    def end_with_input() -> None:
        sys.stdin.read()
        worker.stop()

    threading.Thread(target=end_with_input, daemon=True).start()
    worker.run()
    worker.close()


def keep_quiet() -> threading.Event:
    """While it is set, no link of this process sends a sign of life or a report."""
    quiet, original = threading.Event(), Link.send

    def send(self: Link, opcode: Opcode, *given: Any, **further: Any) -> None:
        if not quiet.is_set() or opcode not in (Opcode.HEARTBEAT, Opcode.REPORT):
            original(self, opcode, *given, **further)

    Link.send = send  # type: ignore[method-assign, assignment]
    return quiet


class WorkerProcess:
    """A worker, perhaps behind a relay."""

    def __init__(self, name: str, address: tuple[str, int], cache: Path, silence_s: float) -> None:
        given = {
            "name": name, "master": f"{address[0]}:{address[1]}", "cache": str(cache), "silence": str(silence_s)
        }  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.losses", "--worker", json.dumps(given)]
        self.process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdin=subprocess.PIPE)

    def close(self) -> None:
        """Whatever state it is in."""
        self.process.kill()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Bed:
    """Master, pipeline, and two workers, of which `desk` is the one that gets lost."""

    def __init__(self, model: Path, cache: Path, dtype: str, silence_s: float = SILENCE_S) -> None:
        self._cache, self._silence_s = cache, silence_s
        settled = ClusterSettings(port=0, silence_s=silence_s)
        self.master = Master(settled, derive_key(TOKEN), version=VERSION, host=HOST, name="master")
        self.master.start()
        self.relay = Relay(self.master.address)
        self.attic = WorkerProcess("attic", self.master.address, cache, silence_s)
        self.desk = WorkerProcess("desk", self.relay.address, cache, silence_s)
        settings = Settings.model_validate(
            {
                "model": {"name": str(model), "dtype": dtype},
                "devices": {"devices": PLACED, "placement": "balanced", "cpu_threads": 1, "profile_seconds": 0.1},
                "engine": {"kv_cache_tokens": 16384},
                "runtime": {"cache_dir": str(cache)},
            }
        )
        self.wait(lambda: len(self.master.nodes) == 2, "both workers")
        self.pipeline = InferencePipeline(settings, cluster=self.master)
        self.pipeline.load()

    @staticmethod
    def wait(condition: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"waited in vain for {what}")
            time.sleep(0.002)

    def lose(self, kind: str) -> None:
        pid = self.desk.process.pid
        if kind == "killed":
            self.desk.process.kill()
        elif kind == "link down":
            self.relay.cut()
        elif kind == "black hole":
            self.relay.swallow()
        elif kind == "device error":
            os.kill(pid, signal.SIGUSR1)
        else:
            os.kill(pid, signal.SIGSTOP)

    def mend(self) -> None:
        """A worker as before, and the model on it."""
        self.desk.close()
        self.relay.restore()
        self.wait(lambda: not self.master.has("desk"), "the old worker's end")
        self.desk = WorkerProcess("desk", self.relay.address, self._cache, self._silence_s)
        self.wait(lambda: self.master.has("desk"), "the worker's return")
        self.pipeline.place(devices=PLACED)

    def close(self) -> None:
        self.pipeline.shutdown()
        self.desk.close()
        self.attic.close()
        self.master.close()
        self.relay.close()


def params_of(number: int, tokens: int) -> SamplingParams:
    """Every second stream is sampled."""
    seeded = {"temperature": 0.9, "seed": number} if number % 2 else {"temperature": 0.0}
    return SamplingParams(max_tokens=tokens, ignore_eos=True, **seeded)  # type: ignore[arg-type]


class Streams:
    """So many at once; who reads notes when each token came."""

    def __init__(self, pipeline: InferencePipeline, count: int, tokens: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.times_s: list[list[float]] = [[] for _ in range(count)]
        self.errors: list[str] = []
        self._threads = []
        self._handles = []
        for number in range(count):
            prompt = [3 + (number * 131 + at * 17) % 1000 for at in range(PROMPT_TOKENS)]
            handle = pipeline.submit(prompt, params_of(number, tokens))
            self._handles.append(handle)
            thread = threading.Thread(target=self._read, args=(number, handle))
            thread.start()
            self._threads.append(thread)

    def _read(self, number: int, handle: object) -> None:
        try:
            for output in handle:  # type: ignore[attr-defined]
                for delta in output.deltas:
                    self.tokens[number].extend(delta.token_ids)
                    self.times_s[number].extend([time.monotonic()] * len(delta.token_ids))
        except Exception as error:  # noqa: BLE001  reported in the table
            self.errors.append(repr(error))

    def abort(self) -> None:
        for handle in self._handles:
            handle.abort()
        self.join()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def longest_gaps_s(self, since_s: float) -> list[float]:
        """Of each stream, the longest time between two tokens of which the later one came after `since_s`."""
        found = []
        for times in self.times_s:
            gaps = [later - earlier for earlier, later in itertools.pairwise(times) if later >= since_s]
            if gaps:
                found.append(max(gaps))
        return found


def one_loss(bed: Bed, kind: str, expected: list[list[int]], tokens: int, dice: random.Random) -> Loss:
    loss = Loss(kind)
    streams = Streams(bed.pipeline, len(expected), tokens)
    at = dice.randrange(tokens // 8, tokens // 2)
    bed.wait(lambda: min(map(len, streams.tokens)) >= at, "streams that run")
    began_s = time.monotonic()
    bed.lose(kind)
    survivors = {"cpu", "attic/cpu"}

    def noticed() -> bool:
        placed = {stage.device_name for stage in bed.pipeline.engine.plan.placement.stages}
        return not bed.master.has("desk") or placed <= survivors

    bed.wait(noticed, "the loss")
    loss.noticed_s = time.monotonic() - began_s
    streams.join()
    loss.gaps_s = streams.longest_gaps_s(began_s)
    loss.failed = streams.errors
    loss.changed = sum(a != b for a, b in zip(streams.tokens, expected, strict=True))
    bed.mend()
    return loss


def cost(options: argparse.Namespace, console: Console) -> None:
    """Of noticing: each moment with signs of life is compared with those before and after it without."""
    quiet = keep_quiet()
    bed = Bed(resolve_model(options.model, default_workdir()), options.cache_dir, options.dtype, LONGEST_SILENCE_S)
    rates: list[float] = []
    try:
        streams = Streams(bed.pipeline, options.streams, COST_TOKENS)
        bed.wait(lambda: min(map(len, streams.tokens)) > 0, "streams that run")
        for moment in range(2 * options.cost_pairs + 1):
            if moment:
                for process in (bed.desk.process, bed.attic.process):
                    process.send_signal(signal.SIGUSR2)
            (quiet.clear if moment % 2 else quiet.set)()
            before, began_s = bed.pipeline.engine.batcher.stats.total_tokens, time.monotonic()
            time.sleep(options.moment_s)
            rates.append((bed.pipeline.engine.batcher.stats.total_tokens - before) / (time.monotonic() - began_s))
            if not bed.pipeline.engine.batcher.stats.running:
                raise RuntimeError("the streams have ended")
        streams.abort()
    finally:
        bed.close()
    shares = [2 * rates[at] / (rates[at - 1] + rates[at + 1]) for at in range(1, len(rates), 2)]
    low, high = interval(shares)
    console.print(
        f"With signs of life and reports {statistics.median(shares):.1%} of the pace without (95 % of the median: "
        f"{low:.1%} to {high:.1%}), {len(shares)} moments of {options.moment_s:g} s, "
        f"{statistics.median(rates):.1f} tok/s"
    )


def table_of(losses: list[Loss], streams: int) -> Table:
    table = Table(title=f"Losses while {streams} streams run")
    columns = (
        "loss",
        "times",
        "streams changed",
        "failed",
        "noticed, median",
        "gap, median",
        "gap, p99",
        "gap, longest",
    )
    for name in columns:
        table.add_column(name, justify="left" if name == "loss" else "right")
    for kind in (*KINDS, "all"):
        those = [loss for loss in losses if kind in (loss.kind, "all")]
        gaps = [gap for loss in those for gap in loss.gaps_s]
        if not those:
            continue
        table.add_row(
            kind, str(len(those)), str(sum(loss.changed for loss in those)),
            str(sum(len(loss.failed) for loss in those)),
            f"{statistics.median(loss.noticed_s for loss in those):.2f} s", f"{statistics.median(gaps):.2f} s",
            f"{percentile(gaps, 0.99):.2f} s", f"{max(gaps):.2f} s",
        )  # fmt: skip
    return table


def measure(options: argparse.Namespace, console: Console) -> None:
    bed = Bed(resolve_model(options.model, default_workdir()), options.cache_dir, options.dtype)
    losses: list[Loss] = []
    try:
        undisturbed = Streams(bed.pipeline, options.streams, options.tokens)
        undisturbed.join()
        dice = random.Random(options.seed)
        for number in range(options.losses):
            kind = KINDS[number % len(KINDS)]
            losses.append(one_loss(bed, kind, undisturbed.tokens, options.tokens, dice))
            worst = max(losses[-1].gaps_s, default=0.0)
            console.print(f"{number + 1}. {kind}: noticed after {losses[-1].noticed_s:.2f} s, gap {worst:.2f} s")
    finally:
        bed.close()
    console.print(table_of(losses, options.streams))
    for message in {text for loss in losses for text in loss.failed}:
        console.print(message)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.losses", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--losses", type=int, default=100, help="in all (default: %(default)s)")
    parser.add_argument("--cost-pairs", type=int, default=20, help="moments with signs of life (default: %(default)s)")
    parser.add_argument("--moment-s", type=float, default=2.5, help="seconds of each (default: %(default)s)")
    parser.add_argument(
        "--dtype", default="float32",
        help="of the model; in bfloat16 a token may depend on what else is in the batch (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--streams", type=int, default=16, help="at a time (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=300, help="of each stream (default: %(default)s)")
    parser.add_argument("--model", default="small", help="size of the random model (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the losses (default: %(default)s)")
    parser.add_argument(
        "--cache-dir", type=Path, default=Settings().runtime.cache_dir, help="compiled kernels (default: %(default)s)"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # a process that this one starts
    options = parser.parse_args()
    if options.worker is not None:
        run_worker(json.loads(options.worker))
        return 0
    console = Console()
    print_machine(console, machine_info(), usable_cores())
    if options.losses:
        measure(options, console)
    if options.cost_pairs:
        cost(options, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
