"""What borrowed tokens cost per step, attended in place and fetched, as a picture.

    python -m benchmarks.plot_lending benchmarks/results/memory.json docs/crossover.svg

The results are those of `benchmarks.lending`. Needs matplotlib: `pip install .[bench]`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.emulated import CARDS, SCALE
from benchmarks.lending import LATENCY_US, SHAPE

LAYERS = 3
LINK_BYTES_S = 11.6e9 / SCALE
LENDER_BYTES_S = CARDS["5070 Ti"][1] / SCALE
TOKEN_BYTES = LAYERS * 2 * SHAPE.kv_heads * SHAPE.head_dim * 2
ROW_BYTES = SHAPE.hidden * 2 + SHAPE.heads * (SHAPE.head_dim + 1) * 4
"""In each layer: a query row in bf16 there, outputs with their lse in fp32 back."""


def fetching_s(tokens: float) -> float:
    """One transfer of all borrowed pages of the stage."""
    return LATENCY_US * 1e-6 + tokens * TOKEN_BYTES / LINK_BYTES_S


def attending_s(tokens: float) -> float:
    """An exchange for each layer, and the lender reads the pages."""
    rounds_s = LAYERS * (2 * LATENCY_US * 1e-6 + ROW_BYTES / LINK_BYTES_S)
    return rounds_s + tokens * TOKEN_BYTES / LENDER_BYTES_S


def crossover() -> float:
    """Borrowed tokens from which on attending in place takes less time."""
    return (attending_s(0) - fetching_s(0)) / (TOKEN_BYTES / LINK_BYTES_S - TOKEN_BYTES / LENDER_BYTES_S)


def draw(curve: Sequence[Mapping[str, float]], target: Path) -> None:
    """Both axes logarithmic; lines are the formulas, marks what was measured."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "vramancer", "svg.fonttype": "none", "font.size": 10}
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
    tokens = [4 * 2 ** (step / 4) for step in range(37)]
    for formula, key, label, colour, mark in (
        (fetching_s, "fetching_s", "fetched in every step", "C3", "s"),
        (attending_s, "attending_s", "attended in place", "C0", "o"),
    ):
        axes.plot(tokens, [1e3 * formula(count) for count in tokens], color=colour, linewidth=1)
        spots = [item["borrowed_tokens"] for item in curve], [max(0.1, 1e3 * item[key]) for item in curve]
        axes.scatter(*spots, color=colour, marker=mark, s=36, label=label)
    axes.axvline(crossover(), color="0.6", linewidth=1, linestyle=":", label=f"crossover, {crossover():.0f} tokens")
    axes.axhline(1e3 * curve[0]["local_s"], color="0.6", linewidth=1, label="a step with all KV at home")
    axes.set(xscale="log", yscale="log", xlabel="tokens borrowed by a stage", ylabel="more per step, ms")
    axes.set_title("What borrowed KV costs: lines predicted, marks measured")
    axes.legend(fontsize=9)
    axes.grid(alpha=0.3)
    figure.savefig(target, metadata={"Date": None})
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot_lending", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("results", type=Path, help="what benchmarks.lending recorded")
    parser.add_argument("target", type=Path, help="the picture, an SVG file")
    given = parser.parse_args(arguments)
    curve = json.loads(given.results.read_text())["curve"]
    draw(curve, given.target)
    print(f"{len(curve)} points, crossover predicted at {crossover():.0f} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
