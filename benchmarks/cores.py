"""Two parts of this machine's processor, one core each, nothing emulated: what overlap gains, and predictions.

    python -m benchmarks.cores --json result.json

The same layers are loaded twice, with as many steps in flight as the engine chooses and with one, and take turns. Both
parts are measured anew before and after each pair of turns; what is predicted for a pair is the mean of both, and how
far they are apart tells whether the machine kept its speed meanwhile.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.emulated import NEW_TOKENS, Rate, measure, predicted_tok_s, record
from benchmarks.machine import LoadMeter, wait_until_quiet
from benchmarks.models import SHAPES, default_workdir, resolve_model
from core.config import load_settings
from core.costs import DeviceProfile
from core.devices import open_devices
from core.inference_pipeline import InferencePipeline
from core.profiling.profiler import LayerProfiler
from core.transfer import TransferManager

_PATIENCE_S = 120.0
STREAMS = (1, 8, 32)

Profiles = tuple[DeviceProfile, ...]


@dataclass(frozen=True)
class Turn:
    """One pair of measurements; `drift` is how many times slower the machine was predicted to be after it than before
    it, or before than after."""

    overlapped: Rate
    sequential: Rate
    drift: float

    @property
    def ratio(self) -> float:
        """What overlap gains."""
        return self.overlapped.tok_s / self.sequential.tok_s


@dataclass(frozen=True)
class Outcome:
    """All turns; `others` is the share of the machine that other processes took meanwhile."""

    layers: str
    turns: tuple[Turn, ...]
    others: float

    def of(self, streams: int) -> list[Turn]:
        """The turns of so many streams."""
        return [turn for turn in self.turns if turn.overlapped.streams == streams]


def compare(model_dir: Path, context: int, seconds: float, rounds: int) -> Outcome:
    """`rounds` turns of each number of streams."""
    most, vocab, layers = max(STREAMS), SHAPES["443m"].vocab, "11,11"
    settings: dict[str, Any] = {
        "model.name": str(model_dir), "devices.devices": "cpu=4GiB,cpu=4GiB", "devices.cpu_threads": 1,
        "devices.layers": layers, "devices.plan_streams": most, "devices.plan_context": context,
        "engine.max_batch_size": most, "engine.kv_cache_tokens": most * (context + NEW_TOKENS),
    }  # fmt: skip
    turns = []
    wait_until_quiet(_PATIENCE_S)
    meter, begun_s = LoadMeter(), _own_cpu_s()
    with ExitStack() as opened:
        overlapped = _open(settings, opened)
        sequential = _open(settings | {"engine.cohorts": 1}, opened)
        before = _profiles(overlapped)
        for _ in range(rounds):
            for streams in STREAMS:
                rates = [measure(p, streams, context, seconds, vocab=vocab) for p in (overlapped, sequential)]
                after = _profiles(overlapped)
                turns.append(_turn(overlapped, rates, before, after))
                before = after
    return Outcome(layers, tuple(turns), meter.others_share(_own_cpu_s() - begun_s))


def _open(settings: dict[str, Any], opened: ExitStack) -> InferencePipeline:
    pipeline = InferencePipeline(load_settings(overrides=settings))
    opened.callback(pipeline.shutdown)
    pipeline.load()
    return pipeline


def _profiles(pipeline: InferencePipeline) -> Profiles:
    """Measured anew, beside models that are loaded and idle; what the store has stays."""
    settings, plan = pipeline.engine.settings, pipeline.engine.plan
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernels").symlink_to(settings.runtime.cache_dir / "kernels", target_is_directory=True)
        runtime = settings.runtime.model_copy(update={"cache_dir": Path(folder)})
        profiler = LayerProfiler(settings.model_copy(update={"runtime": runtime}), TransferManager(), 1)
        return profiler.devices(open_devices(settings.devices, allocate=False), plan.architecture)


def _turn(pipeline: InferencePipeline, rates: Sequence[Rate], before: Profiles, after: Profiles) -> Turn:
    def seconds(rate: Rate, profiles: Profiles) -> float:
        return 1 / predicted_tok_s(pipeline.engine.plan, rate.streams, rate.context, rate.cohorts, profiles)

    expected = [replace(rate, predicted_tok_s=2 / (seconds(rate, before) + seconds(rate, after))) for rate in rates]
    drift = seconds(rates[0], after) / seconds(rates[0], before)
    return Turn(expected[0], expected[1], max(drift, 1 / drift))


def _own_cpu_s() -> float:
    times = psutil.Process().cpu_times()
    return times.user + times.system


def show(outcome: Outcome, console: Console) -> None:
    """A row per turn and the medians."""
    table = Table(title=f"decode, layers {outcome.layers}", title_justify="left")
    for column in ("streams", "in flight", "tok/s", "one at a time", "ratio", "busy"):
        table.add_column(column, justify="right")
    table.add_column("error of the prediction (one at a time)", justify="right")
    table.add_column("drift", justify="right")
    for streams in STREAMS:
        turns = outcome.of(streams)
        for turn in turns:
            rate, other = turn.overlapped, turn.sequential
            table.add_row(
                str(streams), str(rate.cohorts), f"{rate.tok_s:.1f}", f"{other.tok_s:.1f}", f"{turn.ratio:.2f}",
                " ".join(f"{share:.0%}" for share in rate.busy), f"{rate.error:+.1%} ({other.error:+.1%})",
                f"{turn.drift:.2f}",
            )  # fmt: skip
        table.add_row(
            "median", "", "", "", f"{median(turn.ratio for turn in turns):.2f}", "",
            f"{median(turn.overlapped.error for turn in turns):+.1%} "
            f"({median(turn.sequential.error for turn in turns):+.1%})",
            f"{median(turn.drift for turn in turns):.2f}", end_section=True,
        )  # fmt: skip
    console.print(table)
    console.print(f"other processes took {outcome.others:.0%} of the machine")


def as_dict(outcome: Outcome) -> dict[str, Any]:
    """For `benchmarks.plot` too, which wants rates."""
    return {
        "cards": ("cpu", "cpu"),
        "layers": outcome.layers,
        "rates": [asdict(turn.overlapped) for turn in outcome.turns],
        "sequential": [asdict(turn.sequential) for turn in outcome.turns],
        "ratios": [turn.ratio for turn in outcome.turns],
        "drift": [turn.drift for turn in outcome.turns],
        "others": outcome.others,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cores", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--context", type=int, default=32, help="tokens in each prompt")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each number of streams")
    parser.add_argument("--workdir", type=Path, default=default_workdir(), help="where the model is kept")
    parser.add_argument("--json", type=Path, help="record everything measured in this file")
    given = parser.parse_args(arguments)
    outcome = compare(resolve_model("443m", given.workdir), given.context, given.seconds, given.rounds)
    show(outcome, Console(width=140))
    if given.json is not None:
        record(given.json, "real", [as_dict(outcome)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
