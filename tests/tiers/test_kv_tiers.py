"""What steps in flight use is found until the last of them is over."""

from __future__ import annotations

import pytest
import torch
from memory_helpers import block

from core.kv_cache.page_ops import LOCAL, PageLoad
from core.tiers.kv_tiers import StepBlocks


def load(number: int) -> PageLoad:
    return PageLoad(block(number), (LOCAL, 0), 0)


def test_a_block_is_found_until_every_step_that_holds_it_drops_it() -> None:
    blocks, buffer = StepBlocks(), torch.zeros(4, dtype=torch.uint8)
    for _ in range(3):
        blocks.hold(block(1), buffer)
    for _ in range(3):
        assert blocks.place(load(1)) is buffer
        blocks.drop(block(1))
    with pytest.raises(KeyError):
        blocks.place(load(1))


def test_a_block_held_anew_is_found_in_its_new_buffer() -> None:
    blocks, old, new = StepBlocks(), torch.zeros(4, dtype=torch.uint8), torch.ones(4, dtype=torch.uint8)
    blocks.hold(block(1), old)
    blocks.hold(block(2), old)
    blocks.drop(block(1))
    blocks.hold(block(1), new)
    assert blocks.place(load(1)) is new and blocks.place(load(2)) is old
    blocks.clear()
    with pytest.raises(KeyError):
        blocks.place(load(2))
