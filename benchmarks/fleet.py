"""A fleet of 10 to 1,000 mixed machines that come and go, simulated: routing by prefixes and replay, and without them.

    python -m benchmarks.fleet --nodes 10,100,1000 --minutes 5 --seed 1 --json fleet.json
    python -m benchmarks.fleet --part master        # measured, not simulated: what one master's Python costs

The simulation runs the very policies of `core`: which machines form a replica (`core.placement.replicas`), where a
request goes (`core.routing.affinity`), what is computed again first (`core.routing.recovery`). How long computing takes
is the cost model's (`core.costs`) on datasheets; machines, losses and requests are drawn from a seed. Each variant gets
the same ones.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.fleet_master import measure_master, show_master
from benchmarks.fleet_simulation import VARIANTS, Outcome, Simulation, Variant
from benchmarks.fleet_world import Churn, make_churn, make_fleet, make_sessions, model_8b, problem_of
from benchmarks.machine import machine_info
from core.placement.replicas import Partition, ReplicaRates, partition

MEAN_ANSWER, MEAN_TURNS = 225, 3.2
"""Of `make_sessions`, to turn tokens per second into sessions."""


def simulate(
    nodes: int,
    minutes: float,
    seed: int,
    load: float,
    objectives: tuple[float, float],
    losses_per_h: float,
    variants: Sequence[Variant],
) -> tuple[dict[str, Any], list[Outcome]]:
    """All variants on one fleet: what it is, and what came of each. `objectives`: TTFT and gap in seconds."""
    seconds = 60 * minutes
    fleet = make_fleet(nodes, random.Random(seed))
    rates = ReplicaRates(problem_of(model_8b()), objectives[1])
    before = time.perf_counter()
    planned = partition(fleet, rates)
    placing_s = time.perf_counter() - before
    happenings = make_churn(fleet, Churn(losses_per_h), seconds, random.Random(seed + 1))
    per_s = load * planned.tok_s / MEAN_ANSWER / MEAN_TURNS
    sessions = make_sessions(per_s, seconds, random.Random(seed + 2))
    about = {
        "nodes": nodes, "minutes": minutes, "seed": seed, "load": load, "placing_s": placing_s,
        "sessions": len(sessions), "losses": sum(each.what == "leaves" for each in happenings), **_shape(planned),
    }  # fmt: skip
    outcomes = []
    for variant in variants:
        simulation = Simulation(fleet, planned, rates, variant, objectives, seed)
        outcomes.append(simulation.run(sessions, happenings, seconds))
    return about, outcomes


def _shape(planned: Partition) -> dict[str, Any]:
    sizes = [len(replica.nodes) for replica in planned.replicas]
    return {
        "replicas": len(sizes),
        "nodes_per_replica": {size: sizes.count(size) for size in sorted(set(sizes))},
        "spare": len(planned.spare),
        "planned_tok_s": planned.tok_s,
    }


def show(about: dict[str, Any], outcomes: Sequence[Outcome], console: Console) -> None:
    """A table for one fleet."""
    sizes = ", ".join(f"{count} of {size}" for size, count in about["nodes_per_replica"].items())
    table = Table(
        title=f"{about['nodes']} machines: {about['replicas']} replicas (machines each: {sizes}), {about['spare']} "
        f"spare; {about['sessions']} sessions in {about['minutes']:g} minutes, {about['losses']} losses",
        title_justify="left",
    )
    table.add_column("routing, after a loss")
    columns = ("requests", "within\nobjectives", "goodput\ntok/s", "gap ms\np50", "gap ms\np99", "TTFT s\np99",
               "longest\npause s", "computed\ntwice", "begun\nanew", "prefix\nhits", "simulated\nin s")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="right")
    for one in outcomes:
        table.add_row(
            one.variant, str(one.requests), f"{one.within:.1%}", f"{one.goodput_tok_s:,.0f}",
            f"{1e3 * one.gap_p50_s:.0f}", f"{1e3 * one.gap_p99_s:.0f}", f"{one.ttft_p99_s:.1f}",
            f"{one.longest_pause_s:.1f}", f"{one.lost_share:.2%}", str(one.anew), f"{one.hit_rate:.0%}",
            f"{one.wall_s:.0f}",
        )  # fmt: skip
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=("simulation", "master"), default="simulation", help="what to do")
    parser.add_argument("--nodes", default="10,100,1000", help="machines, a fleet for each number")
    parser.add_argument("--minutes", type=float, default=5.0, help="of simulated time")
    parser.add_argument("--seed", type=int, default=1, help="of machines, losses and requests")
    parser.add_argument(
        "--load", type=float, default=0.25, help="share of what the replicas could decode that is asked"
    )
    parser.add_argument("--ttft", type=float, default=5.0, help="objective: seconds to the first token")
    parser.add_argument("--gap", type=float, default=0.15, help="objective: mean seconds between a request's tokens")
    parser.add_argument("--losses", type=float, default=1.0, help="of each machine, per hour")
    parser.add_argument("--json", type=Path, help="record everything in this file")
    given = parser.parse_args(arguments)
    console, machine = Console(width=180), machine_info()
    console.print(f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}", highlight=False)
    record: dict[str, Any] = {"machine": machine, "part": given.part}
    if given.part == "master":
        costs = measure_master()
        show_master(costs, console)
        record["costs"] = [asdict(cost) for cost in costs]
    else:
        record["fleets"] = []
        for nodes in map(int, given.nodes.split(",")):
            objectives = (given.ttft, given.gap)
            about, outcomes = simulate(nodes, given.minutes, given.seed, given.load, objectives, given.losses, VARIANTS)
            show(about, outcomes, console)
            record["fleets"].append(about | {"outcomes": [asdict(one) for one in outcomes]})
    if given.json is not None:
        given.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
