"""The queue of writes is bounded and prefers hot blocks; the pace bounds bytes per second."""

from __future__ import annotations

import pytest

from core.tiers.write_back import SpeedMeter, Write, WritePace, WriteQueue


def test_writes_come_out_in_order_and_once() -> None:
    queue = WriteQueue(4)
    for number in (1, 2, 1, 3):
        assert queue.offer(Write(bytes([number]), 0.0)) is None
    assert queue.cancel(b"\2") and not queue.cancel(b"\2")
    assert [queue.take(), queue.take(), queue.take()] == [Write(b"\1", 0.0), Write(b"\3", 0.0), None]


def test_a_second_offer_may_add_that_the_block_leaves() -> None:
    queue = WriteQueue(1)
    queue.offer(Write(b"a", 1.0))
    queue.offer(Write(b"a", 1.0, leave=True))
    queue.offer(Write(b"a", 2.0))
    assert queue.take() == Write(b"a", 2.0, leave=True)


def test_a_full_queue_drops_the_coldest() -> None:
    queue = WriteQueue(2)
    queue.offer(Write(b"warm", 2.0))
    queue.offer(Write(b"cold", 1.0))
    assert queue.offer(Write(b"colder", 0.5)) == b"colder"
    assert queue.offer(Write(b"hot", 3.0)) == b"cold"
    assert len(queue) == 2 and b"warm" in queue and b"hot" in queue


def test_a_queue_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="room"):
        WriteQueue(0)


def test_the_pace_keeps_the_mean_rate() -> None:
    pace = WritePace(100.0)
    assert pace.delay_s(50, 0.0) == pytest.approx(0.5)
    assert pace.delay_s(50, 0.5) == pytest.approx(0.5)
    assert pace.delay_s(100, 5.0) == pytest.approx(1.0), "idle time is not saved up"
    assert WritePace(None).delay_s(10**9, 0.0) == 0.0


def test_the_meter_follows_recent_moves() -> None:
    meter = SpeedMeter(5.0)
    assert meter.bytes_s == 5.0
    meter.add(100, 1.0)
    assert meter.bytes_s == pytest.approx(100.0)
    for _ in range(100):
        meter.add(100, 2.0)
    assert meter.bytes_s == pytest.approx(50.0, rel=0.01)
    assert SpeedMeter().bytes_s is None
