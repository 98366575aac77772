"""How much KV the devices hold together, when those with room lend to those without. Pure.

A stage needs `T k_i` bytes for `T` tokens and has `F_i` left beside its weights. Alone, the scarcest stage sets
`T = min(F_i / k_i)`. With lending, deficits are met by what others have left over, each lender giving at most its
share::

    sum over i of max(0, T k_i - F_i)  <=  sum over j of min(share_j, F_j - T k_j)    over devices j without a deficit

Devices that hold no layers take part with all their memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core.costs.plan import StagePlan
from core.placement.search import largest


@dataclass(frozen=True, slots=True)
class PooledKV:
    """`tokens` in all; `local_tokens[i]` of them have room on the device of stage `i` itself, the others are lent."""

    tokens: int
    local_tokens: tuple[int, ...]


def pool_kv(
    stages: Sequence[StagePlan],
    idle_limits: Sequence[int],
    *,
    kv_tokens: int,
    max_tokens: int,
    block_size: int,
    lend_ratio: float,
) -> PooledKV:
    """How many tokens of KV to offer, in whole blocks: at least the `kv_tokens` that every stage has room for
    itself, at most `max_tokens`.

    Args:
        idle_limits: bytes of the devices that have no stage.
        lend_ratio: largest share of its limit that a device lends.
    """
    free = [stage.limit_bytes - stage.weight_bytes - stage.workspace_bytes for stage in stages]
    page_bytes = [stage.kv_bytes_per_token * block_size for stage in stages]

    def fits(blocks: int) -> bool:
        lacking, spare = 0, sum(int(lend_ratio * limit) for limit in idle_limits)
        for stage, room, page in zip(stages, free, page_bytes, strict=True):
            left = room - blocks * page
            # whole pages; one of a stage that borrows stays empty, for blocks to change places through
            lacking += (blocks + 1 - room // page) * page if left < 0 else 0
            spare += min(int(lend_ratio * stage.limit_bytes), max(0, left))
        return lacking <= spare

    most = largest(fits, kv_tokens // block_size, max(kv_tokens, max_tokens) // block_size)
    local = [most if page == 0 else min(most, room // page) for room, page in zip(free, page_bytes, strict=True)]
    return PooledKV(most * block_size, tuple(blocks * block_size for blocks in local))


def pooled_bound(stages: Sequence[StagePlan], idle_limits: Sequence[int] = ()) -> int:
    """Tokens that all memory together would hold if every byte could be used for any stage."""
    free = sum(stage.limit_bytes - stage.weight_bytes - stage.workspace_bytes for stage in stages) + sum(idle_limits)
    return free // max(1, sum(stage.kv_bytes_per_token for stage in stages))
