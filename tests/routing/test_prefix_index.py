"""Which replica holds which prefix, against a plain account of each one's blocks."""

from __future__ import annotations

from collections import OrderedDict

from hypothesis import given, settings
from hypothesis import strategies as st

from core.routing.prefix_index import PrefixIndex

REPLICAS = ("a", "b", "c")


def chain(tokens: tuple[int, ...]) -> list[tuple[int, ...]]:
    """A hash stands for everything before it, as chained hashes do."""
    return [tokens[: index + 1] for index in range(len(tokens))]


_chains = st.lists(st.integers(0, 2), max_size=7).map(lambda tokens: chain(tuple(tokens)))
_moves = st.lists(
    st.tuples(st.sampled_from(REPLICAS), st.sampled_from(("use", "use", "use", "forget", "shrink")), _chains)
)


@settings(max_examples=200)
@given(moves=_moves, asked=_chains, capacity=st.integers(0, 12))
def test_matches_are_what_each_replica_would_say_itself(
    moves: list[tuple[str, str, list[tuple[int, ...]]]], asked: list[tuple[int, ...]], capacity: int
) -> None:
    index, plain = PrefixIndex(), {name: OrderedDict[tuple[int, ...], None]() for name in REPLICAS}
    room = dict.fromkeys(REPLICAS, capacity)
    for name in REPLICAS:
        index.set_capacity(name, capacity)
    for name, what, hashes in moves:
        if what == "forget":
            index.forget(name)
            index.set_capacity(name, capacity)
            plain[name].clear()
            room[name] = capacity
        elif what == "shrink":
            room[name] = len(hashes)
            index.set_capacity(name, len(hashes))
        else:
            index.record(name, hashes)
            for digest in reversed(hashes):
                plain[name].pop(digest, None)
                plain[name][digest] = None
        while len(plain[name]) > room[name]:
            plain[name].popitem(last=False)
        index.check_invariants()
    expected = {}
    for name in REPLICAS:
        assert index.size(name) == len(plain[name])
        held = 0
        while held < len(asked) and asked[held] in plain[name]:
            held += 1
        if held:
            expected[name] = held
    assert index.matches(asked) == expected


def test_a_chain_loses_its_tail_before_its_head() -> None:
    index = PrefixIndex()
    index.set_capacity("a", 3)
    index.record("a", chain((1, 2, 3)))
    index.record("a", chain((9,)))
    assert index.matches(chain((1, 2, 3))) == {"a": 2}
