"""A tier below learns its speed from the blocks that it moves."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
from memory_helpers import LAYOUT, InProcessPeer, block, payload

from core.tiers import lower_tier
from core.tiers.compress import Compressor
from core.tiers.lower_tier import LowerTier
from core.tiers.peer import PeerStore
from core.tiers.records import TierSpeed


class SteppingTime:
    """Every look at the clock takes `step_s`."""

    def __init__(self, step_s: float = 0.0) -> None:
        self.step_s, self.now_s = step_s, 1000.0

    def perf_counter(self) -> float:
        self.now_s += self.step_s
        return self.now_s


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> SteppingTime:
    time = SteppingTime()
    monkeypatch.setattr(lower_tier, "time", SimpleNamespace(perf_counter=time.perf_counter))
    return time


def peer_tier(speed: TierSpeed | None = None) -> LowerTier:
    return LowerTier(PeerStore(InProcessPeer(1 << 16), Compressor(LAYOUT), LAYOUT.nbytes), speed)


def write(tier: LowerTier) -> bool:
    return tier.write(block(1), block(0), memoryview(bytearray(payload(1))))


def read(tier: LowerTier) -> bool:
    return tier.read(block(1), memoryview(bytearray(LAYOUT.nbytes)))


def test_each_direction_has_its_speed(time: SteppingTime) -> None:
    tier = peer_tier(TierSpeed(5e9, 3e9, 0.25))
    assert tier.speed == TierSpeed(5e9, 3e9, 0.25), "as measured at the start"
    time.step_s = 0.5
    assert write(tier) and tier.speed == TierSpeed(5e9, LAYOUT.nbytes / 0.5, 0.25)
    time.step_s = 0.125
    assert read(tier) and tier.speed == TierSpeed(LAYOUT.nbytes / 0.125, LAYOUT.nbytes / 0.5, 0.25)


@pytest.mark.parametrize("move", [read, write])
def test_a_direction_not_known_yet_counts_as_the_other(time: SteppingTime, move: Callable[[LowerTier], bool]) -> None:
    tier = peer_tier()
    assert tier.speed is None
    assert tier.store.write(block(1), block(0), memoryview(bytearray(payload(1))))
    assert not tier.read(block(2), memoryview(bytearray(LAYOUT.nbytes))) and tier.speed is None, "a miss says nothing"
    time.step_s = 0.5
    assert move(tier)
    assert tier.speed == TierSpeed(LAYOUT.nbytes / 0.5, LAYOUT.nbytes / 0.5)


@pytest.mark.parametrize("move", [read, write])
def test_a_move_too_fast_for_the_clock_counts_as_a_nanosecond(
    time: SteppingTime, move: Callable[[LowerTier], bool]
) -> None:
    tier = peer_tier()
    assert tier.store.write(block(1), block(0), memoryview(bytearray(payload(1))))
    assert move(tier)
    assert tier.speed is not None and tier.speed.read_bytes_s == pytest.approx(LAYOUT.nbytes / 1e-9)
