"""One look at a server: its answers to all that the dashboard shows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from core.errors import AuthenticationError, NotFoundError, UnavailableError, VRAMancerError
from vramancer.cli.live.answers import Batcher, Devices, Nodes, Pipeline, Queue, Reading, System, Tasks
from vramancer.cli.live.connection import KeptClient

SELDOM = 5
"""What hardly changes is asked at every so manieth look."""
ABSENT = 30
"""And what the server did not have, at every so manieth."""

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Look:
    """What a server at `url` said at `at_s`. `started_s` is when its process began, on the same clock; `left_out` says
    why something that it could have said is missing."""

    url: str
    at_s: float
    pipeline: Pipeline
    queue: Queue
    batcher: Batcher
    hostname: str = ""
    started_s: float | None = None
    readings: Mapping[str, Reading] = field(default_factory=dict)
    nodes: Nodes | None = None
    tasks: Tasks | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)


class Inquiry:
    """Looks at the server that `client` reaches, again and again; for one thread.

    Model, requests and speed must be answered. The rest may be missing, as on servers of before, and is asked for less
    often.
    """

    def __init__(self, client: KeptClient, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._clock = clock
        self._looks = 0
        self._kept: dict[str, object] = {}
        self._next: dict[str, int] = {}
        self._left_out: dict[str, str] = {}
        self._system_s = 0.0

    def look(self) -> Look:
        """Raises `VRAMancerError`: `UnavailableError` without an answer, `AuthenticationError` for a wrong token."""
        ask = self._client.ask
        pipeline = ask("/api/pipeline/status", Pipeline)
        queue = ask("/api/queue/status", Queue)
        batcher = ask("/api/batcher/stats", Batcher)
        devices = self._optional("/api/gpu", Devices)
        tasks = self._optional("/api/tasks", Tasks)
        nodes = self._optional("/api/nodes", Nodes, every=SELDOM)
        system = self._optional("/api/system", System, every=SELDOM)
        self._looks += 1
        return Look(
            self._client.url,
            self._clock(),
            pipeline,
            queue,
            batcher,
            hostname=system.hostname if system else "",
            started_s=self._system_s - system.process.uptime_s if system else None,
            readings={each.name: each.reading for each in devices.devices if each.reading} if devices else {},
            nodes=nodes,
            tasks=tasks,
            left_out=dict(self._left_out),
        )

    def _optional(self, path: str, kind: type[Answer], *, every: int = 1) -> Answer | None:
        """The answer, if need be the one of before; None if there is none."""
        if self._looks >= self._next.get(path, 0):
            self._next[path] = self._looks + every
            self._left_out.pop(path, None)
            self._kept.pop(path, None)
            try:
                self._kept[path] = self._client.ask(path, kind)
                if kind is System:
                    self._system_s = self._clock()
            except NotFoundError:
                self._next[path] = self._looks + ABSENT
            except (AuthenticationError, UnavailableError):
                raise
            except VRAMancerError as error:
                self._left_out[path] = error.message
        kept = self._kept.get(path)
        return kept if isinstance(kept, kind) else None
