"""Attending in place, bringing home and recomputing: which is cheapest, by arithmetic that can be checked by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.costs import LinkProfile
from core.lending import AwayGroup, Choice, SiteSpeeds, decide
from core.lending.away import LEAST_GAIN

PCIE = LinkProfile(11.6e9, 30e-6)
LAN = LinkProfile(0.11e9, 300e-6)
CARDS = SiteSpeeds(PCIE, PCIE, 936e9, 896e9, layers=24, row_bytes=10240)
"""24 layers of a 14B model on a 3090, a 5070 Ti lends."""
TOKEN_BYTES = 24 * 4096


def group(local: int, away: int, *, room: int, steps: float = 256, recompute_s: float | None = None) -> AwayGroup:
    """In tokens."""
    return AwayGroup(local * TOKEN_BYTES, away * TOKEN_BYTES, room * TOKEN_BYTES, 1, steps, recompute_s)


def test_a_stream_that_goes_on_comes_home_when_there_is_room() -> None:
    """24 rounds of 60 us are 1.4 ms of every step; 2,000 tokens come home in 17 ms."""
    decision = decide(group(2000, 2000, room=4000), CARDS)
    assert (decision.choice, decision.nbytes) == (Choice.FETCH, 2000 * TOKEN_BYTES)


def test_one_that_is_about_to_end_stays_where_it_is() -> None:
    assert decide(group(2000, 2000, room=4000, steps=5), CARDS).choice is Choice.ATTEND


def test_without_room_nothing_comes() -> None:
    assert decide(group(2000, 2000, room=0), CARDS).choice is Choice.ATTEND


def test_where_all_is_at_home_nothing_is_to_be_done() -> None:
    assert decide(group(2000, 0, room=2000), CARDS).choice is Choice.ATTEND


def test_a_lender_that_reads_slowly_keeps_what_it_reads_in_the_same_time() -> None:
    """Main memory at 40 GB/s, beside a card at 936: most of it comes home, and both sides are done together."""
    host = replace(CARDS, lender_bytes_s=40e9)
    asked = group(40_000, 20_000, room=19_000, steps=2000)
    decision = decide(asked, host)
    assert decision.choice is Choice.FETCH
    own_s = (asked.local_bytes + decision.nbytes) / host.own_bytes_s
    there_s = host.rounds_s(1) + (asked.away_bytes - decision.nbytes) / host.lender_bytes_s
    assert own_s == pytest.approx(there_s, rel=1e-3)


def test_over_a_slow_link_computing_again_is_faster_than_carrying() -> None:
    """1,000 tokens take 0.9 s over a gigabit network and 0.4 s to compute."""
    slow = replace(CARDS, out=LAN, home=LAN)
    assert decide(group(1000, 1000, room=2000, recompute_s=0.4), slow).choice is Choice.RECOMPUTE
    assert decide(group(1000, 1000, room=2000, recompute_s=4.0), slow).choice is Choice.FETCH
    assert decide(group(1000, 1000, room=999, recompute_s=0.4), slow).choice is not Choice.RECOMPUTE
    assert decide(group(1000, 1000, room=2000, recompute_s=0.4, steps=2), slow).choice is Choice.ATTEND


def test_computing_again_is_no_gain_where_the_lender_reads_beside_the_card() -> None:
    """At home all 60,000 tokens take 6.3 ms of each step; 40,000 there and 20,000 at the lender take 4.2 ms."""
    assert decide(group(40_000, 20_000, room=20_000, steps=2000, recompute_s=1.0), CARDS).choice is Choice.ATTEND


def test_what_computing_again_saves_is_less_what_reading_all_at_home_takes() -> None:
    """A step takes 0.2 s for the rounds and 3 s at the lender, against 0.4 s at home: 32 s, against 10 s and 4 s."""
    link = LinkProfile(10.0)
    slow = SiteSpeeds(link, link, own_bytes_s=1000.0, lender_bytes_s=100.0, layers=1, row_bytes=1)
    decision = decide(AwayGroup(100, 300, room_bytes=300, rows=1, steps=10, recompute_s=10.0), slow)
    assert (decision.choice, decision.nbytes) == (Choice.RECOMPUTE, 300)
    assert decision.saved_s == pytest.approx(18.0)


links = st.builds(LinkProfile, st.floats(1e7, 1e11), st.floats(0, 1e-3)) | st.just(LinkProfile(math.inf))
speeds = st.builds(
    SiteSpeeds, links, links, st.floats(1e9, 1e12), st.floats(1e9, 1e12), st.integers(1, 80), st.integers(1, 65536)
)
tokens = st.integers(0, 1 << 34)
groups = st.builds(
    AwayGroup, tokens, tokens, tokens, st.integers(1, 64), st.floats(0, 1e4), st.none() | st.floats(0, 100)
)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(groups, speeds, st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_no_other_amount_is_cheaper(asked: AwayGroup, between: SiteSpeeds, shares: list[float]) -> None:
    """Whatever could come home instead costs as much or more, but for the margin that small gains have to exceed."""

    def cost_s(nbytes: int) -> float:
        left = between.attention_s(asked.local_bytes + nbytes, asked.away_bytes - nbytes, asked.rows)
        return asked.steps * left + (between.home.transfer_s(nbytes) if nbytes else 0.0)

    decision = decide(asked, between)
    most = min(asked.away_bytes, asked.room_bytes)
    assert 0 <= decision.nbytes <= asked.room_bytes
    chosen_s = cost_s(0) - decision.saved_s
    least_s = min(cost_s(int(share * most)) for share in shares)
    assert chosen_s <= least_s + LEAST_GAIN * cost_s(0) + 1e-9 * cost_s(0)
