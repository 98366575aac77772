"""What stages are told of a sequence's blocks."""

from __future__ import annotations

from core.kv_cache.block_table import BlockTable, PrefixChain


def make(*blocks: int) -> BlockTable:
    """A table whose blocks have all been told."""
    table = BlockTable(PrefixChain(b"", 2))
    table.blocks.extend(blocks)
    assert table.tell_all().tolist() == list(blocks)
    return table


def test_what_has_been_told_is_not_told_again() -> None:
    table = make(5, 6)
    assert table.tell_changes() == []
    table.blocks.append(7)
    assert table.tell_changes() == [(2, 7)]
    assert table.tell_changes() == []


def test_a_block_in_the_place_of_one_that_was_told_is_told_once() -> None:
    table = make(5, 6)
    table.replace(0, 8)
    table.replace(0, 9)
    assert table.tell_changes() == [(0, 9)]
    assert table.tell_changes() == []


def test_a_block_that_was_not_told_yet_and_is_replaced_is_told_once() -> None:
    table = make(5)
    table.blocks.append(6)
    table.replace(1, 7)
    assert table.tell_changes() == [(1, 7)]
