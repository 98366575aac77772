"""Stages that work at the same time: a thread for each, for each slow link and for sampling, with queues between them.

    submit -> [stage 0] -> [link 0-1] -> [stage 1] -> ... -> [sampler] -> done

Steps pass every thread in the order of submission, so a stage sees the pages that earlier steps wrote, and block copies
happen between the right two steps. A step that failed passes on without being computed, but for what it asks of pages.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from core.errors import PageMoveError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Station(Generic[T]):
    """One thread's work: `run(item)`, or `skip(item)` for one that has failed before; `prepare` is called once, in the
    thread."""

    name: str
    run: Callable[[T], None]
    prepare: Callable[[], None] = lambda: None
    skip: Callable[[T], None] = lambda item: None


@dataclass(slots=True)
class _Parcel(Generic[T]):
    item: T
    done: Callable[[T, Exception | None], None]
    error: Exception | None = None


class StationLine(Generic[T]):
    """The threads. Items come out in the order in which they went in."""

    def __init__(self, stations: Sequence[Station[T]]) -> None:
        self._queues: list[queue.SimpleQueue[_Parcel[T] | None]] = [queue.SimpleQueue() for _ in stations]
        self._threads = [
            threading.Thread(target=self._work, args=(index, station), name=f"vrm-{station.name}", daemon=True)
            for index, station in enumerate(stations)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, item: T, done: Callable[[T, Exception | None], None]) -> None:
        """Send an item down the line; `done(item, error)` is called from the last thread."""
        self._queues[0].put(_Parcel(item, done))

    def close(self) -> None:
        """Let everything that is in the line come out, and end the threads."""
        self._queues[0].put(None)
        for thread in self._threads:
            thread.join()

    def _work(self, index: int, station: Station[T]) -> None:
        station.prepare()
        following = self._queues[index + 1] if index + 1 < len(self._queues) else None
        while (parcel := self._queues[index].get()) is not None:
            try:
                (station.run if parcel.error is None else station.skip)(parcel.item)
            except Exception as error:  # noqa: BLE001  travels with the step to whoever waits for it
                if parcel.error is None or isinstance(error, PageMoveError):  # which harms more than this step
                    parcel.error = error
            if following is not None:
                following.put(parcel)
            else:
                parcel.done(parcel.item, parcel.error)
            del parcel  # its tensors must not live on while this thread waits
        if following is not None:
            following.put(None)
