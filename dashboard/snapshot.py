"""What the server's state looks like to those who watch: one object, and what has changed in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

BLOCKS = 128
"""Of each tier, the hottest."""
Snapshot = dict[str, Any]
Patch = list[list[Any]]
"""Changes in their order: `[path, value]` sets what is at a path of keys and positions, `[path]` takes a key out."""


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True, slots=True)
class Source:
    """A part of the snapshot: what the API answers at `path`, asked for every `every_s` seconds."""

    name: str
    path: str
    every_s: float = 1.0
    shape: Callable[[Any], Any] = _same


def _pipeline(body: Any) -> Any:
    """Memory comes with its blocks from elsewhere, checks from `/health`."""
    return {key: value for key, value in body.items() if key not in ("memory", "subsystems")}


def _memory(body: Any) -> Any:
    """Hotness to two digits: it cools all the time, and nobody sees a thousandth."""
    tiers = [{**tier, "mean_hotness": _two(tier["mean_hotness"]), "hottest": _cooled(tier)} for tier in body["tiers"]]
    return {**body, "tiers": tiers}


def _cooled(tier: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{**block, "hotness": _two(block["hotness"])} for block in tier["hottest"]]


def _two(value: float) -> float:
    return round(value, 2) if math.isfinite(value) else 0.0


SOURCES = (
    Source("pipeline", "/api/pipeline/status", shape=_pipeline),
    Source("queue", "/api/queue/status"),
    Source("batcher", "/api/batcher/stats"),
    Source("memory", f"/api/memory?blocks={BLOCKS}", shape=_memory),
    Source("gpu", "/api/gpu", 2.0),
    Source("tasks", "/api/tasks"),
    Source("health", "/health", 3.0),
    Source("system", "/api/system", 3.0),
    Source("nodes", "/api/nodes", 5.0),
)


def difference(old: Any, new: Any) -> Patch:
    """What turns `old` into `new`. Lists of another length, and values of another kind, are set as a whole."""
    patch: Patch = []
    _compare(old, new, [], patch)
    return patch


def _compare(old: Any, new: Any, path: list[Any], patch: Patch) -> None:
    if isinstance(old, dict) and isinstance(new, dict):
        patch.extend([[*path, key]] for key in old if key not in new)
        for key, value in new.items():
            if key in old:
                _compare(old[key], value, [*path, key], patch)
            else:
                patch.append([[*path, key], value])
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, value in enumerate(new):
            _compare(old[index], value, [*path, index], patch)
    elif type(old) is not type(new) or old != new:
        patch.append([path, new])
