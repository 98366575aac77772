"""Which block goes first: the coldest tail, never a parent before its child, never one in use."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_helpers import block

from core.tiers.chain_index import ChainIndex
from core.tiers.hotness import HeatModel, HeatTable


@pytest.fixture
def heat() -> HeatTable:
    return HeatTable(HeatModel(10.0))


def add(index: ChainIndex, heat: HeatTable, number: int, parent: int, now_s: float = 0.0) -> None:
    heat.meet(block(number), now_s)
    index.add(block(number), block(parent))


def drain(index: ChainIndex) -> list[int]:
    order = []
    while (coldest := index.coldest()) is not None:
        order.append(int.from_bytes(coldest, "big"))
        index.remove(coldest)
        index.check_invariants()
    return order


def test_a_chain_loses_its_tail_first_even_if_its_head_is_colder(heat: HeatTable) -> None:
    index = ChainIndex(heat)
    for number in (1, 2, 3):
        add(index, heat, number, number - 1, now_s=float(number))
    assert drain(index) == [3, 2, 1]


def test_children_that_come_before_their_parents_hold_them_too(heat: HeatTable) -> None:
    index = ChainIndex(heat)
    for number in (3, 2, 1):
        add(index, heat, number, number - 1)
    assert drain(index) == [3, 2, 1]


def test_the_coldest_chain_goes_first(heat: HeatTable) -> None:
    index = ChainIndex(heat)
    add(index, heat, 1, 0, now_s=0.0)
    add(index, heat, 2, 1, now_s=0.0)
    add(index, heat, 11, 10, now_s=5.0)
    heat.use(block(2), 9.0)
    index.requeue(block(2))
    assert drain(index) == [11, 2, 1]


def test_a_pin_holds_a_block_and_so_its_parents(heat: HeatTable) -> None:
    index = ChainIndex(heat)
    for number in (1, 2, 3):
        add(index, heat, number, number - 1)
    index.pin(block(2))
    index.pin(block(2))
    assert drain(index) == [3]
    index.unpin(block(2))
    assert index.coldest() is None
    index.unpin(block(2))
    assert drain(index) == [2, 1]


def test_a_tree_is_listed_children_first_and_parents_first(heat: HeatTable) -> None:
    index = ChainIndex(heat)
    for number, parent in ((4, 2), (2, 1), (3, 1), (1, 0), (9, 8)):
        add(index, heat, number, parent)
    down = index.with_descendants(block(1))
    assert set(down) == {block(number) for number in (1, 2, 3, 4)}
    assert down.index(block(4)) < down.index(block(2)) < down.index(block(1)) and down[-1] == block(1)
    up = index.parents_first()
    assert up.index(block(1)) < up.index(block(2)) < up.index(block(4)) and len(up) == 5


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 12), st.integers(0, 12)), max_size=150))
def test_random_changes_keep_the_queue_right(steps: list[tuple[int, int, int]]) -> None:
    heat = HeatTable(HeatModel(10.0))
    index = ChainIndex(heat)
    pinned: list[bytes] = []
    for now, (kind, number, parent) in enumerate(steps):
        name = block(number)
        if kind <= 1 and name not in index:
            add(index, heat, number, parent if parent < number else 0, float(now))
        elif kind == 2 and name in index:
            index.pin(name)
            pinned.append(name)
        elif kind == 3 and pinned:
            index.unpin(pinned.pop())
        elif kind == 4 and name in index:
            heat.use(name, float(now))
            index.requeue(name)
        elif kind == 5 and (coldest := index.coldest()) is not None:
            evictable = [known for known in index if index.is_evictable(known)]
            assert heat.order(coldest) == min(heat.order(known) for known in evictable)
            index.remove(coldest)
        index.check_invariants()
