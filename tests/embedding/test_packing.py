"""Which inputs are computed together."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.embedding.packing import MOST_PADDING, SMALL_TOKENS, WaitingInputs, count_that_fits


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "count"),
    [
        ([10], 4, 1),  # however long it is
        ([10, 10, 10], 20, 2),
        ([10, 9, 1], 1000, 3),  # a small batch is not split
        ([100, 100, 100, 10], 10_000, 3),  # the short one would be padding
        ([100, 95, 90, 90], 10_000, 4),
    ],
)
def test_how_many_make_a_batch(lengths: list[int], max_tokens: int, count: int) -> None:
    assert count_that_fits(lengths, max_tokens) == count


def test_requests_take_turns_so_that_a_short_one_does_not_wait_for_all_of_a_long_one() -> None:
    waiting = WaitingInputs()
    waiting.add(0, [200] * 50)
    waiting.add(1, [5])
    first, second = waiting.take(400), waiting.take(400)
    assert [place.request for place in first] == [0, 0]
    assert [place.request for place in second] == [1]


def test_inputs_of_several_requests_are_computed_together() -> None:
    waiting = WaitingInputs()
    waiting.add(0, [50, 300])
    waiting.add(1, [290, 48])
    assert {(place.request, place.length) for place in waiting.take(2048)} == {(0, 300), (1, 290)}
    assert {(place.request, place.length) for place in waiting.take(2048)} == {(1, 48), (0, 50)}
    assert waiting.take(2048) == []


def test_what_is_given_up_is_not_computed() -> None:
    waiting = WaitingInputs()
    waiting.add(0, [5, 6])
    waiting.add(1, [5])
    assert waiting.remove(0) == 2
    assert waiting.remove(7) == 0
    assert [place.request for place in waiting.take(100)] == [1]
    waiting.check_invariants()


@given(
    requests=st.lists(st.lists(st.integers(1, 600), min_size=1, max_size=40), max_size=8),
    max_tokens=st.integers(1, 3000),
)
def test_every_input_is_computed_once_and_batches_keep_their_bounds(requests: list[list[int]], max_tokens: int) -> None:
    waiting = WaitingInputs()
    for number, lengths in enumerate(requests):
        waiting.add(number, lengths)
    seen: Counter[tuple[int, int]] = Counter()
    while batch := waiting.take(max_tokens):
        waiting.check_invariants()
        seen.update((place.request, place.number) for place in batch)
        lengths = [place.length for place in batch]
        assert lengths == sorted(lengths, reverse=True)
        padded = len(batch) * lengths[0]
        assert len(batch) == 1 or padded <= max_tokens
        assert padded <= SMALL_TOKENS or padded - sum(lengths) <= MOST_PADDING * padded
    assert seen == {(number, index): 1 for number, each in enumerate(requests) for index in range(len(each))}
    assert len(waiting) == 0
