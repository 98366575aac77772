"""Measured against predicted rates, as a picture.

    python -m benchmarks.plot benchmarks/results/emulated-cards.json docs/predicted.svg

The results are those of `benchmarks.pipeline` and `benchmarks.placement`. Needs matplotlib: `pip install .[bench]`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = {
    "overlapped": ("emulated, as many steps in flight as chosen", "o"),
    "sequential": ("emulated, one step at a time", "s"),
    "placed": ("emulated pairs, three strategies", "^"),
    "real": ("two CPU cores, not emulated", "D"),
}
"""What is drawn: its name in the legend, and its mark."""


@dataclass(frozen=True)
class Point:
    """One measurement in tokens per second, and what was predicted for it."""

    kind: str
    predicted: float
    measured: float


def points(results: Mapping[str, Any]) -> Iterator[Point]:
    """Every rate of a file of results."""
    for result in results.get("overlap", ()):
        yield from _rates("overlapped", result["rates"])
        yield from _rates("sequential", result["sequential"])
    for result in results.get("placement", ()):
        yield from _rates("placed", [outcome["rate"] for outcome in result["outcomes"]])
    for result in results.get("real", ()):
        yield from _rates("real", result["rates"] + result["sequential"])


def _rates(kind: str, rates: Sequence[Mapping[str, Any]]) -> Iterator[Point]:
    for rate in rates:
        yield Point(kind, rate["predicted_tok_s"], rate["tok_s"])


def draw(drawn: Sequence[Point], target: Path) -> None:
    """Both axes logarithmic; the grey band is 10 % to either side of what was predicted."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "vramancer", "svg.fonttype": "none", "font.size": 10}
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 5.2), layout="constrained")
    values = [value for point in drawn for value in (point.predicted, point.measured)]
    ends = [min(values) / 1.3, max(values) * 1.3]
    axes.plot(ends, ends, color="0.3", linewidth=1, label="as predicted, and 10 % to either side")
    axes.fill_between(ends, [0.9 * end for end in ends], [1.1 * end for end in ends], color="0.88", linewidth=0)
    for kind, (label, mark) in KINDS.items():
        mine = [point for point in drawn if point.kind == kind]
        if mine:
            spots = [point.predicted for point in mine], [point.measured for point in mine]
            axes.scatter(*spots, marker=mark, s=34, alpha=0.8, label=label)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="predicted, tok/s", ylabel="measured, tok/s")
    axes.set_title("Decode rates, measured against predicted")
    axes.legend(loc="upper left", fontsize=9)
    axes.grid(alpha=0.3)
    figure.savefig(target, metadata={"Date": None})
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, help="JSON that --json of the benchmarks wrote")
    parser.add_argument("target", type=Path, help="picture to write, .svg or .png")
    given = parser.parse_args(arguments)
    drawn = list(points(json.loads(given.results.read_text())))
    if not drawn:
        parser.error(f"{given.results} has no rates to draw")
    draw(drawn, given.target)
    worst = max(drawn, key=lambda point: abs(point.measured / point.predicted - 1))
    print(f"{len(drawn)} measurements, the worst {worst.measured / worst.predicted - 1:+.1%} ({worst.kind})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
