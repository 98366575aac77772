"""How much KV devices hold together, when those with room lend to those without."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.costs import (
    DeviceProfile,
    LayerCosts,
    LinkProfile,
    LinkTopology,
    PlacementDevice,
    PlacementPlan,
    PlacementProblem,
    StagePlan,
)
from core.placement.pooled import PooledKV, _late_s, pool_of, pooled_bound

BLOCK = 16
COSTS = LayerCosts(0, (1,), 0, 0, False, (1,))
SPEED = DeviceProfile("gpu", 1e9, ((1, 1e9),))


def stage(limit: int, per_token: int, weights: int = 0, workspace: int = 0) -> StagePlan:
    return StagePlan("gpu", 0, 0, 1, weights, per_token, 0, workspace, limit)


def alone(stages: list[StagePlan]) -> int:
    """Tokens that every stage has room for itself, in whole blocks."""
    rooms = [(s.limit_bytes - s.weight_bytes - s.workspace_bytes) // (s.kv_bytes_per_token * BLOCK) for s in stages]
    return min(rooms) * BLOCK


def pool(stages: list[StagePlan], idle: list[int], ratio: float = 1.0, most: int = 1 << 40) -> PooledKV:
    lenders = tuple(PlacementDevice(f"idle{index}", limit, SPEED) for index, limit in enumerate(idle))
    devices = (PlacementDevice("gpu", 1 << 60, SPEED), *lenders)
    request = PlacementProblem("any", COSTS, devices, LinkTopology(), max_kv_tokens=most, block_size=BLOCK)
    unused = tuple(device.name for device in lenders)
    return pool_of(request, PlacementPlan("any", "any", tuple(stages), alone(stages), unused), ratio)


@pytest.mark.parametrize(
    ("limits", "idle", "ratio", "tokens"),
    [
        pytest.param([160, 160], [], 1.0, 160, id="equal: nothing to lend"),
        pytest.param([160, 480], [], 1.0, 304, id="half of both, less the page that stays empty"),
        pytest.param([160, 480], [], 0.0, 160, id="nobody lends"),
        pytest.param([160, 480], [], 0.1, 192, id="48 bytes at most, one of three pages stays empty"),
        pytest.param([160], [160], 1.0, 304, id="an idle device lends all it has"),
        pytest.param([160], [160], 0.5, 224, id="or its share"),
    ],
)
def test_what_is_lent_is_added_to_the_scarcest_stage(
    limits: list[int], idle: list[int], ratio: float, tokens: int
) -> None:
    pooled = pool([stage(limit, 1) for limit in limits], idle, ratio)
    assert pooled.tokens == tokens
    assert (min(pooled.local_tokens) < pooled.tokens) == (tokens > min(limits))


@pytest.mark.parametrize(
    ("idle", "tokens", "local"),
    [
        ("idle", 160, (160, 160)),  # beside the stage that needs none
        ("desk/idle", 304, (304, 160)),
        ("attic/idle", 160, (160, 160)),
    ],
)
def test_devices_lend_to_those_of_their_machine(idle: str, tokens: int, local: tuple[int, int]) -> None:
    stages = (stage(4800, 1), replace(stage(160, 1), device_name="desk/gpu"))
    devices = tuple(PlacementDevice(name, 4800, SPEED) for name in ("gpu", "desk/gpu", idle))
    devices = (*devices[:2], replace(devices[2], limit_bytes=160))
    request = PlacementProblem("any", COSTS, devices, LinkTopology(), max_kv_tokens=1 << 40, block_size=BLOCK)
    pooled = pool_of(request, PlacementPlan("any", "any", stages, 160, (idle,)), 1.0)
    assert (pooled.tokens, pooled.local_tokens) == (tokens, local)


QUICK, SLOW = LinkProfile(1e3, 1e-6), LinkProfile(1e3, 0.5)
"""An extent of 64 bytes takes 0.06 s over the network. One of them answers at once, the other in a second."""


@pytest.mark.parametrize(
    ("link", "flops", "extent", "idle", "tokens", "far"),
    [
        pytest.param(QUICK, 10**8, 4, {"desk/idle": 160}, 304, ["desk/idle"], id="attention there is quickest"),
        pytest.param(SLOW, 10**8, 4, {"desk/idle": 160}, 160, [], id="fetching is quicker"),
        pytest.param(QUICK, 0, 4, {"desk/idle": 160}, 160, [], id="computing is quicker"),
        pytest.param(None, 10**8, 4, {"desk/idle": 160}, 160, [], id="it has not been measured"),
        pytest.param(QUICK, 10**8, 0, {"desk/idle": 160}, 160, [], id="it is not wanted"),
        pytest.param(QUICK, 10**8, 4, {"idle": 160, "desk/idle": 160}, 464, ["desk/idle"], id="beside it first"),
        pytest.param(QUICK, 10**8, 4, {"idle": 4800, "desk/idle": 160}, 4960 - 16 + 160, ["desk/idle"], id="all of it"),
        pytest.param(
            QUICK, 10**8, 4, {"desk/idle": 160, "attic/idle": 320}, 624, ["attic/idle", "desk/idle"], id="of several"
        ),
    ],
)
def test_devices_lend_to_other_machines_where_the_network_is_quick(
    link: LinkProfile | None, flops: int, extent: int, idle: dict[str, int], tokens: int, far: list[str]
) -> None:
    sizes = {"gpu": 160, **idle}
    devices = tuple(PlacementDevice(name, limit, SPEED) for name, limit in sizes.items())
    ways = {pair: link for pair in permutations(sizes, 2) if link is not None}
    costs = replace(COSTS, layer_flops=(flops,))
    request = PlacementProblem(
        "any", costs, devices, LinkTopology(ways), max_kv_tokens=1 << 40, block_size=BLOCK, far_extent_blocks=extent
    )
    plan = PlacementPlan("any", "any", (stage(160, 1),), 160, tuple(idle))
    pooled = pool_of(request, plan, 1.0)
    assert (pooled.tokens, pooled.far) == (tokens, tuple(("gpu", name) for name in far))
    assert not far or _late_s(request, plan, pooled, tokens, (1, 1))[0][0] > 0, "which is part of predictions"


def test_no_more_than_is_of_use() -> None:
    assert pool([stage(160, 1), stage(4800, 1)], [], most=200).tokens == 208, "in whole blocks"


def test_weights_and_workspace_are_not_pooled() -> None:
    assert pool([stage(260, 1, weights=90, workspace=10), stage(480, 1)], []).tokens == 304
    assert pooled_bound([stage(260, 1, weights=90, workspace=10), stage(480, 1)]) == 320


STAGES = st.lists(
    st.builds(
        lambda room, per_token, weights: stage(room + weights, per_token, weights),
        st.integers(5_000, 500_000), st.integers(1, 40), st.integers(0, 100_000),
    ),
    min_size=1, max_size=5,
)  # fmt: skip
IDLE = st.lists(st.integers(0, 500_000), max_size=2)


@given(STAGES, IDLE, st.floats(0, 1))
def test_nobody_lends_beyond_ratio_or_limit_by_a_byte(stages: list[StagePlan], idle: list[int], ratio: float) -> None:
    pooled = pool(stages, idle, ratio)
    assert pooled.tokens >= alone(stages)
    assert pooled.tokens <= max(alone(stages), pooled_bound(stages, idle))
    lendable, lacking = sum(int(ratio * limit) for limit in idle), 0
    for each, local in zip(stages, pooled.local_tokens, strict=True):
        free = each.limit_bytes - each.weight_bytes - each.workspace_bytes
        page = each.kv_bytes_per_token * BLOCK
        own = each.kv_bytes_per_token * local
        assert own <= free
        assert local % BLOCK == 0
        away = (pooled.tokens - local) // BLOCK
        assert away == 0 or free - own < page, "what fits at home stays at home"
        lacking += (away + 1) * page if away else 0
        lendable += min(int(ratio * each.limit_bytes), free - own) if not away else 0
    assert lacking <= lendable


@given(STAGES, IDLE)
def test_nearly_all_memory_is_used_where_the_ratio_allows(stages: list[StagePlan], idle: list[int]) -> None:
    """All but the page that stays empty, and what is left over of whole pages: per device, less than two pages."""
    tokens = pool(stages, idle).tokens
    over = 2 * len(stages) * max(s.kv_bytes_per_token for s in stages) * BLOCK
    rounding = BLOCK + -(-over // sum(s.kv_bytes_per_token for s in stages))
    assert tokens >= pooled_bound(stages, idle) - rounding


@given(STAGES, IDLE, st.integers(1, 200_000))
def test_a_device_more_never_makes_it_less(stages: list[StagePlan], idle: list[int], further: int) -> None:
    assert pool(stages, [*idle, further], 0.7).tokens >= pool(stages, idle, 0.7).tokens


def test_a_tight_and_a_roomy_card_reach_the_pooled_bound() -> None:
    """24 GiB with most of the weights, and 16 GiB with few."""
    gib = 1 << 30
    stages = [stage(24 * gib, 96 << 10, weights=20 * gib), stage(16 * gib, 32 << 10, weights=4 * gib)]
    assert pool(stages, [], 0.7).tokens >= 0.95 * pooled_bound(stages)
    assert pool(stages, [], 0.7).tokens > 2.5 * alone(stages)
