"""What layers take beside reading and computing, and beside each other."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from steering import LONGEST_WAIT_S

from core.profiling import layer_times
from core.profiling.layer_times import OVERHEAD_ROWS, SHARING_ROWS, measure_sharing, split_overheads


def test_overheads_are_told_apart_by_what_grows_with_the_rows() -> None:
    beyond = [2e-4 + 3e-5 * rows for rows in OVERHEAD_ROWS]
    assert split_overheads(OVERHEAD_ROWS, beyond) == pytest.approx((2e-4, 3e-5))


def test_one_row_takes_what_it_took() -> None:
    """However the others scatter: a stream alone is predicted from this."""
    layer_s, row_s = split_overheads((1, 8, 32), [5e-4, 4e-4, 2e-3])
    assert layer_s + row_s == pytest.approx(5e-4)
    assert row_s > 0


def test_nothing_is_faster_than_the_roofline() -> None:
    assert split_overheads((1, 8, 32), [-1e-4, -2e-4, -3e-3]) == (0.0, 0.0)
    assert split_overheads((1, 8), [1e-4, 0.0]) == (1e-4, 0.0)


class Clock(threading.local):
    """A time of its own for every thread."""

    now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s


class Part:
    """Takes as long as it is told, and longer while the others compute; waits for them, so they have to."""

    def __init__(self, clock: Clock, room: Room) -> None:
        self.clock, self.room, self.rows, self.short = clock, room, 0, 64

    def set_step(self, rows: int, context: int) -> None:
        assert context == self.short
        self.rows = rows

    def step(self) -> None:
        if self.room.crowded:
            self.room.meet.wait(LONGEST_WAIT_S)
        self.clock.now_s += 0.25 * (self.room.factors[self.rows] if self.room.crowded else 1.0)


class Room:
    def __init__(self, parts: int, factors: tuple[float, float]) -> None:
        self.meet = threading.Barrier(parts)
        self.factors = dict(zip(SHARING_ROWS, factors, strict=True))
        self.crowded = False
        self.told: list[bool] = []
        self.prepared: set[int] = set()

    def overlap(self, several: bool) -> None:
        self.told.append(several)
        self.crowded = several

    def prepare(self) -> None:
        self.prepared.add(threading.get_ident())


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize(("factors", "found"), [((1.5, 3.0), (1.5, 3.0)), ((0.5, 1.0), (1.0, 1.0))])
def test_parts_compute_alone_and_all_at_once(
    monkeypatch: pytest.MonkeyPatch, number: int, factors: tuple[float, float], found: tuple[float, float]
) -> None:
    clock, room = Clock(), Room(number, factors)
    monkeypatch.setattr(layer_times, "time", clock)
    parts: list[Any] = [Part(clock, room) for _ in range(number)]
    assert measure_sharing(parts, room.prepare, room.overlap, 40.0) == pytest.approx(found)
    assert room.told.count(True) >= 2 * len(SHARING_ROWS), "by turns"
    assert not room.crowded, "as it was before"
    assert len(room.prepared) == number


def test_what_fails_in_a_part_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, room = Clock(), Room(1, (1.0, 1.0))
    monkeypatch.setattr(layer_times, "time", clock)

    class Broken(Part):
        def step(self) -> None:
            if self.room.crowded:
                raise RuntimeError("out of memory")
            super().step()

    broken: Any = Broken(clock, room)
    with pytest.raises(RuntimeError, match="out of memory"):
        measure_sharing([broken], room.prepare, room.overlap, 1.0)
