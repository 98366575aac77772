"""Streams and events that copy at once and remember who waits for whom."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class FakeStream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log = name, log

    def wait_stream(self, other: FakeStream) -> None:
        self._log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: FakeEvent) -> None:
        self._log.append(f"{self.name} waits for event on {event.stream}")


class FakeEvent:
    """Done once `done` is set; then 2 ms lie between any two."""

    def __init__(self, streams: FakeStreams) -> None:
        self._streams = streams
        self.stream = ""

    def record(self, stream: FakeStream) -> None:
        self.stream = stream.name

    def synchronize(self) -> None:
        self._streams.log.append(f"the host waits for event on {self.stream}")

    def query(self) -> bool:
        return self._streams.done

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.stream == end.stream, "events of two devices cannot be compared"
        return 2.0


class FakeStreams:
    """For devices whose tensors are on the CPU: "cpu" and "cpu:0" are two of them."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.used: list[str] = []
        self.kept: list[str] = []
        self.done = True

    def copying(self, torch_device: str, direction: str) -> FakeStream:
        return FakeStream(f"{direction} {torch_device}", self.log)

    def current(self, torch_device: str) -> FakeStream:
        return FakeStream(f"compute {torch_device}", self.log)

    def event(self) -> FakeEvent:
        return FakeEvent(self)

    @contextmanager
    def use(self, stream: FakeStream) -> Iterator[Any]:
        self.used.append(stream.name)
        yield

    def keep(self, tensor: torch.Tensor, stream: FakeStream) -> None:
        self.kept.append(stream.name)
