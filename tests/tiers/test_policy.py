"""Tables of decisions: what to restore."""

from __future__ import annotations

import pytest

from core.tiers.policy import worth_restoring
from core.tiers.records import Tier, TierSpeed

MB = 10**6
SPEEDS = {Tier.L4: TierSpeed(1e9, 1e9, 0.001), Tier.L5: TierSpeed(1e9, 1e9, 0.0), Tier.L6: TierSpeed(1e7, 1e7, 1.0)}
HOST, DISK, STORE = Tier.L3, Tier.L5, Tier.L6


@pytest.mark.parametrize(
    ("tiers", "recompute_s", "restored"),
    [
        ([], [], 0),
        ([HOST] * 4, [0.01] * 4, 4),  # 0.1 ms each over the link
        ([HOST] * 4, [0.00001] * 4, 0),  # computing is faster than the link
        ([DISK] * 4, [0.01] * 4, 4),  # 1.1 ms each
        ([DISK] * 4, [0.0005] * 4, 0),
        ([HOST, HOST, STORE, STORE], [0.01] * 4, 2),  # the store takes a second to answer
        ([HOST, HOST, STORE, STORE], [0.01, 0.01, 2.0, 2.0], 4),
        ([STORE, HOST, HOST], [0.01, 0.6, 0.6], 3),  # the whole run pays though its head alone does not
        ([STORE, HOST, HOST], [0.01, 0.4, 0.4], 0),
        ([DISK, DISK], [0.01, 0.0], 1),  # the second costs something and saves nothing
    ],
)
def test_the_prefix_that_saves_most(tiers: list[Tier], recompute_s: list[float], restored: int) -> None:
    assert restored == worth_restoring(
        tiers, MB, SPEEDS, link_bytes_s=1e10, link_latency_s=0.0, block_recompute_s=recompute_s
    )


def test_the_link_counts_once_per_copy_and_by_bytes() -> None:
    def plan(latency_s: float) -> int:
        return worth_restoring(
            [HOST] * 3, MB, {}, link_bytes_s=1e9, link_latency_s=latency_s, block_recompute_s=[0.002] * 3
        )

    assert plan(0.0) == 3
    assert plan(0.0029) == 3
    assert plan(0.0031) == 0


def test_the_cost_is_the_documented_sum() -> None:
    restore_s = 0.01 + 0.004 + (0.001 + 0.001) + 0.002
    for recompute_s, restored in ((restore_s - 1e-6, 0), (restore_s + 1e-6, 4)):
        assert restored == worth_restoring(
            [HOST, Tier.L4, DISK, DISK], MB, SPEEDS,
            link_bytes_s=1e9, link_latency_s=0.01, block_recompute_s=[0.0, 0.0, 0.0, recompute_s],
        )  # fmt: skip
