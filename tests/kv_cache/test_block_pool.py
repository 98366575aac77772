"""The block pool and the manager's bookkeeping."""

from __future__ import annotations

import random

import pytest

from core.kv_cache.block_pool import BlockPool
from core.kv_cache.block_table import PrefixChain, prefix_root
from core.kv_cache.companions import Lender
from core.kv_cache.manager import KVCacheManager
from core.kv_cache.page_ops import LOCAL, PageCopy


def test_a_released_block_with_content_is_found_until_its_id_is_reused() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.register(block, b"content")
    pool.release([block])
    assert pool.lookup(b"content") == block
    assert pool.allocate(1) != [block], "blocks without content are reused first"
    assert pool.allocate(1) == [block]
    assert pool.lookup(b"content") is None
    assert pool.evictions == 1


def test_a_chain_loses_its_tail_before_its_head() -> None:
    pool = BlockPool(4)
    chain = pool.allocate(4)
    for index, block in enumerate(chain):
        pool.register(block, bytes([index]))
    pool.release(reversed(chain))
    assert [pool.allocate(1)[0] for _ in range(4)] == chain[::-1]


def test_the_least_recently_used_chain_goes_first() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.register(first, b"1")
    pool.register(second, b"2")
    pool.release([first])
    pool.release([second])
    pool.share([first])  # used again
    pool.release([first])
    assert pool.allocate(1) == [second]


def test_live_blocks_are_never_handed_out() -> None:
    pool = BlockPool(3)
    (live,) = pool.allocate(1)
    pool.register(live, b"live")
    pool.allocate(2)
    with pytest.raises(ValueError, match="0 free"):
        pool.allocate(1)
    assert pool.lookup(b"live") == live


def test_releasing_too_often_is_an_error() -> None:
    pool = BlockPool(1)
    (block,) = pool.allocate(1)
    pool.release([block])
    with pytest.raises(ValueError, match="more often"):
        pool.release([block])


def test_the_audit_finds_a_leaked_block() -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="ref-counts"):
        pool.check_invariants([])


def test_the_audit_names_the_blocks_whose_users_differ_and_no_others() -> None:
    pool = BlockPool(5)
    used, leaked, borrowed = pool.allocate(3)
    with pytest.raises(AssertionError) as caught:
        pool.check_invariants([[used, borrowed], [borrowed]])
    assert str(caught.value).endswith(f" {[leaked, borrowed]}"), "neither the one that is right nor the free ones"


def test_the_audit_names_ten_blocks_where_more_are_wrong() -> None:
    pool = BlockPool(12)
    leaked = pool.allocate(12)
    with pytest.raises(AssertionError) as caught:
        pool.check_invariants([])
    assert str(caught.value).endswith(f" {leaked[:10]}")


def test_prefix_hashes_depend_on_their_parent_and_the_salt() -> None:
    def hashes(salt: bytes, tokens: list[int], owner: str = "") -> list[bytes]:
        return PrefixChain(prefix_root(salt, owner), 2).extend(tokens, len(tokens))

    assert hashes(b"a", [1, 2, 3, 4])[1] != hashes(b"a", [9, 9, 3, 4])[1]
    assert hashes(b"a", [1, 2])[0] != hashes(b"b", [1, 2])[0]
    assert hashes(b"a", [1, 2, 3]) == hashes(b"a", [1, 2])
    assert hashes(b"a", [1, 2], "you")[0] != hashes(b"a", [1, 2], "me")[0], "what one has said, no other can find"


def test_a_block_is_indexed_only_once_its_kv_is_written() -> None:
    kv = KVCacheManager(8, 2)
    kv.open(1, [1, 2, 3, 4, 5], read_prefix=True)
    kv.grow(1, 0, 5)
    assert kv.match_prefix([1, 2, 3, 4, 5]) == []
    kv.commit(1, [1, 2, 3, 4, 5], 3)
    assert len(kv.match_prefix([1, 2, 3, 4, 5])) == 1


def test_a_hit_leaves_a_token_to_compute() -> None:
    kv = KVCacheManager(8, 2)
    kv.open(1, [1, 2, 3, 4], read_prefix=True)
    kv.grow(1, 0, 4)
    kv.commit(1, [1, 2, 3, 4], 4)
    assert kv.open(2, [1, 2, 3, 4], read_prefix=True) == 2


def test_writing_a_shared_block_copies_it_and_the_last_owner_keeps_the_original() -> None:
    kv = KVCacheManager(8, 4)
    kv.open(1, [1, 2, 3], read_prefix=True)
    kv.grow(1, 0, 3)
    original = kv.table(1).blocks[0]
    kv.fork(1, 2, 2)
    assert kv.table(2).blocks[0] == original
    assert kv.grow(2, 2, 3)
    (step,) = kv.take_step(1)
    assert step.ops == (PageCopy((LOCAL, original), (LOCAL, kv.table(2).blocks[0])),)
    assert kv.table(2).blocks[0] != original
    assert kv.grow(1, 3, 4)
    assert kv.take_step(2) == (), "the last owner writes in place"
    kv.check_invariants([1, 2])


def test_growing_beyond_the_pool_changes_nothing() -> None:
    kv = KVCacheManager(2, 2)
    kv.open(1, [1, 2, 3, 4, 5], read_prefix=True)
    assert not kv.grow(1, 0, 5)
    assert len(kv.table(1)) == 0
    assert kv.pool.num_free == 2


def test_the_capacity_is_what_all_blocks_hold_together() -> None:
    assert KVCacheManager(6, 4).capacity_tokens == 24


def test_a_sequence_that_goes_on_is_found_again_after_the_cache_was_forgotten() -> None:
    kv = KVCacheManager(8, 2)
    tokens = [1, 2, 3, 4, 5, 6, 7]
    kv.open(1, tokens, read_prefix=True)
    kv.grow(1, 0, 7)
    kv.commit(1, tokens, 4)
    kv.forget_cached()
    assert kv.match_prefix(tokens) == []
    kv.commit(1, tokens, 6)
    assert kv.match_prefix(tokens) == list(kv.table(1).blocks[:3]), "from its first block on"
    kv.check_invariants([1])


class ToldOfSteps(Lender):
    """Notes down of which steps it is told that their pages were moved."""

    def __init__(self) -> None:
        self.done: list[tuple[int, bool]] = []

    def borrow(self, blocks: int) -> None: ...

    def step_taken(self, step: int) -> None: ...

    def step_done(self, step: int, moved: bool) -> None:
        self.done.append((step, moved))

    def check_invariants(self) -> None: ...


def test_pages_left_behind_spoil_the_steps_in_flight_and_the_one_being_gathered() -> None:
    told = ToldOfSteps()
    kv = KVCacheManager(2, 2, lender=lambda kv: told)
    for step in (1, 2, 3):
        kv.take_step(step)
    kv.step_done(1)
    kv.step_done(2, moved=False)
    kv.step_done(3)
    for step in (4, 5):
        kv.take_step(step)
        kv.step_done(step)
    assert told.done == [(1, True), (2, False), (3, False), (4, False), (5, True)]


@pytest.mark.parametrize("seed", range(5))
def test_random_operations_keep_the_invariants(seed: int) -> None:
    rng = random.Random(seed)
    kv = KVCacheManager(24, 4)
    live: dict[int, list[int]] = {}
    written: dict[int, int] = {}
    for step in range(400):
        action = rng.random()
        if action < 0.3:
            tokens = [rng.randrange(3) for _ in range(rng.randint(1, 20))]
            cached = kv.open(step, tokens, read_prefix=rng.random() < 0.8)
            live[step], written[step] = tokens, cached
        elif live and action < 0.7:
            seq = rng.choice(sorted(live))
            upto = min(len(live[seq]), written[seq] + rng.randint(1, 6))
            if upto > written[seq] and kv.grow(seq, written[seq], upto):
                kv.commit(seq, live[seq], upto)
                written[seq] = upto
        elif live and action < 0.85:
            parent = rng.choice(sorted(live))
            if written[parent] > 0:
                kv.fork(parent, step, written[parent])
                live[step], written[step] = [*live[parent][: written[parent]], 7, 8, 9], written[parent]
        elif live:
            seq = rng.choice(sorted(live))
            kv.close(seq)
            del live[seq], written[seq]
        kv.check_invariants(live)
    for seq in list(live):
        kv.close(seq)
    kv.check_invariants([])
    assert kv.pool.num_free == 24
