"""What a server says to `vramancer dashboard` in the documentation and in tests, beside what it says to `status`."""

from __future__ import annotations

import json
import math
from typing import Any, TypeVar

import msgspec

from vramancer.cli.live.look import Inquiry
from vramancer.cli.live.trend import Trend
from vramancer.cli.live.watch import Seen
from vramancer.cli.picture import Facts

GIB = 1 << 30
UPTIME_S = 94_212.0
BUSY = (0.93, 0.88, 0.71)
"""Share of the time that each stage computes."""
PREDICTED = (0.90, 0.86, 0.74)

Answer = TypeVar("Answer")


def tokens_by(at_s: float) -> int:
    """What has been generated: with more requests at some times than at others."""
    return round(1_262_000 + 51 * at_s - 560 * math.cos(at_s / 40 - 1.6) - 150 * math.cos(at_s / 13 + 1.2))


def answers(facts: Facts, at_s: float) -> dict[str, Any]:
    """By path, `at_s` seconds after some moment."""
    pipeline = dict(facts.pipeline)
    pipeline["stages"] = [_stage(index, stage, at_s) for index, stage in enumerate(pipeline["stages"])]
    memory = dict(pipeline["memory"])
    memory["tiers"] = [{**tier, "moves": MOVES[tier["tier"]], **SPEEDS} for tier in memory["tiers"]]
    pipeline["memory"] = memory
    batcher = {
        **facts.batcher, "generated_tokens": tokens_by(at_s), "batch_size": 3, "max_batch_size": 64, "preemptions": 2,
        "latency": LATENCY,
    }  # fmt: skip
    devices = [{"name": name, "reading": reading} for name, reading in READINGS.items()]
    node = {
        "id": "1", "hostname": "rig", "roles": ["api", "engine"], "status": "joined", "address": None, "link": None,
        "devices": devices, "layers": {},
    }  # fmt: skip
    return {
        "/api/pipeline/status": pipeline,
        "/api/queue/status": facts.queue,
        "/api/batcher/stats": batcher,
        "/api/gpu": {"devices": devices},
        "/api/nodes": {"nodes": [node], "discovery": {"status": "disabled"}, "left_out": [], "offer": None},
        "/api/system": {"hostname": "rig", "process": {"uptime_s": UPTIME_S + at_s}},
        "/api/tasks": TASKS,
    }


def _stage(index: int, stage: dict[str, Any], at_s: float) -> dict[str, Any]:
    return {
        **stage, "index": index, "weight_bytes": int((12.6, 9.4, 5.5)[index] * GIB), "attention": "triton",
        "busy_seconds": round(40_000 * (3 - index) + BUSY[index] * at_s, 3),
        "predicted_seconds": round(41_000 * (3 - index) + PREDICTED[index] * at_s, 3),
        "seconds_per_forward": (0.0117, 0.0108, 0.0089)[index],
    }  # fmt: skip


def _reading(utilization: float, celsius: float, watts: float, limit: float, width: int, **more: Any) -> dict[str, Any]:
    return {
        "utilization": utilization, "temperature_c": celsius, "power_w": watts, "power_limit_w": limit,
        "pcie_generation": 4, "pcie_width": width, "throttling": [], "other_bytes": 0, "unavailable": None, **more,
    }  # fmt: skip


READINGS = {
    "cuda:0": _reading(0.96, 71.0, 318.0, 350.0, 16, other_bytes=int(0.6 * GIB)),
    "cuda:1": _reading(0.91, 64.0, 241.0, 300.0, 8),
    "cuda:2": _reading(0.74, 83.0, 172.0, 175.0, 4, throttling=["SW Power Cap"]),
}
LATENCY = {
    "first_token": {"count": 812, "p50": 0.214, "p95": 0.871, "p99": 1.94},
    "between_tokens": {"count": 120_344, "p50": 0.0143, "p95": 0.0181, "p99": 0.0246},
    "request": {"count": 809, "p50": 4.31, "p95": 18.6, "p99": 41.2},
}
SPEEDS = {"write_bytes_per_second": 2_100_000_000}
MOVES: dict[str, list[dict[str, Any]]] = {
    "L3": [
        {"kind": "demotion", "from": "L1", "to": "L3", "blocks": 61_204},
        {"kind": "demotion", "from": "L3", "to": "L5", "blocks": 57_236},
        {"kind": "promotion", "from": "L3", "to": "L1", "blocks": 4_100},
        {"kind": "promotion", "from": "L5", "to": "L3", "blocks": 310},
    ],
    "L5": [
        {"kind": "demotion", "from": "L3", "to": "L5", "blocks": 57_236},
        {"kind": "promotion", "from": "L5", "to": "L3", "blocks": 310},
        {"kind": "eviction", "from": "L5", "to": None, "blocks": 4_446},
    ],
}
TASKS = {
    "running": [
        {"id": "t9", "kind": "promote", "detail": "128 blocks from disk", "priority": "normal", "resource": "disk",
         "status": "running", "started_at": 1_700_000_000.0, "seconds": 3.2, "error": None},
    ],
    "recent": [
        {"id": "t8", "kind": "load", "detail": "Qwen/Qwen3-32B", "priority": "normal", "resource": "devices",
         "status": "failed", "started_at": 1_700_000_000.0, "seconds": 2.4, "error": "cuda:2 lacks 1.9 GiB."},
        {"id": "t7", "kind": "load", "detail": "Qwen/Qwen3-14B", "priority": "normal", "resource": "devices",
         "status": "completed", "started_at": 1_700_000_000.0, "seconds": 41.3, "error": None},
    ],
}  # fmt: skip


class Told:
    """Stands for the client: it is answered what `answers` hold, by path."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.answers: dict[str, Any] = {}

    def ask(self, path: str, kind: type[Answer]) -> Answer:
        return msgspec.json.decode(json.dumps(self.answers[path]).encode(), type=kind)


def seen_after(facts: Facts, seconds: int) -> Seen:
    """By somebody who has looked every second."""
    told, trend, time_s = Told(facts.url), Trend(), 0.0
    inquiry = Inquiry(told, lambda: time_s)  # type: ignore[arg-type]
    for second in range(seconds + 1):
        time_s = float(second)
        told.answers = answers(facts, time_s)
        look = inquiry.look()
        lately = trend.add(look)
    return Seen(look, lately)
