"""What the scheduler does when memory is taken back, with requests for raw numbers, and what stages are told."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from test_decisions import computed, land, make_request, make_scheduler, step

from core.batching.scheduler import Scheduler
from core.batching.sequence import RawAnswer, Request, SequenceStatus
from core.batching.stats import StatsKeeper
from core.batching.step import SchedulerLimits
from core.kv_cache.block_table import RopeBorder
from core.kv_cache.manager import KVCacheManager


def running(scheduler: Scheduler) -> set[str]:
    return {s.request.request_id for s in scheduler.live_sequences() if s.status is SequenceStatus.RUNNING}


def test_stages_are_told_a_new_sequence_whole_and_then_what_is_new() -> None:
    scheduler = make_scheduler()
    request = make_request("a", 8)
    scheduler.add(request)
    first = scheduler.schedule()
    assert first is not None
    assert first.record.starts.tolist() == [0] and first.record.counts.tolist() == [8]
    assert [(new.seq_id, new.token_ids.tolist()) for new in first.record.new] == [
        (request.sequences[0].seq_id, request.prompt_token_ids)
    ]
    land(scheduler, first, 7)
    second = scheduler.schedule()
    assert second is not None
    assert (second.record.starts.tolist(), second.record.tokens.tolist()) == ([8], [7]) and not second.record.new


def test_memory_taken_back_makes_those_served_last_give_way_until_the_rest_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler = make_scheduler()
    for arrival in range(4):
        scheduler.add(make_request(f"r{arrival}", 7, arrival))
    step(scheduler)
    assert scheduler.kv.pool.num_referenced == 8
    monkeypatch.setattr(scheduler.kv.pages, "backed", lambda blocks: 5)
    scheduler.kv.refresh_limit()
    scheduler.keep_to_limit()
    assert running(scheduler) == {"r0", "r1"}
    assert scheduler.kv.pool.num_referenced == 4
    assert scheduler.num_preemptions == 2
    scheduler.keep_to_limit()
    assert scheduler.num_preemptions == 2, "what is left fits"


def test_what_is_better_computed_again_gives_up_its_blocks() -> None:
    scheduler = make_scheduler()
    requests = [make_request(f"r{arrival}", 8, arrival) for arrival in range(2)]
    for request in requests:
        scheduler.add(request)
    step(scheduler)
    scheduler.kv.unwanted.add(requests[0].sequences[0].seq_id)
    scheduler.drop_unwanted()
    assert running(scheduler) == {"r1"} and not scheduler.kv.unwanted
    assert scheduler.num_preemptions == 1


def raw_request(name: str, tokens: int, arrival: int) -> Request:
    return make_request(name, tokens, arrival, raw=RawAnswer("logits", "last"))


def test_raw_requests_and_others_take_turns() -> None:
    scheduler = make_scheduler(chunk=4)
    decoding, raw = make_request("a", 4, 0), raw_request("r", 12, 1)
    a, r = decoding.sequences[0].seq_id, raw.sequences[0].seq_id
    scheduler.add(decoding)
    step(scheduler)
    scheduler.add(raw)
    taken = []
    for _ in range(5):
        output = scheduler.schedule()
        taken += computed(output)
        assert output is not None
        land(scheduler, output)
    assert taken == [(r, 4), (a, 1), (r, 4), (a, 1), (r, 4)]


def test_a_raw_request_alone_does_not_wait_for_anybody() -> None:
    scheduler = make_scheduler(chunk=4)
    raw = raw_request("r", 8, 0)
    scheduler.add(raw)
    for _ in range(2):
        output = scheduler.schedule()
        assert computed(output) == [(raw.sequences[0].seq_id, 4)]
        assert output is not None
        land(scheduler, output)
    assert not scheduler.has_work


@pytest.mark.parametrize("restarts", [True, False])
def test_a_sequence_that_outgrows_its_rope_is_computed_anew_with_the_first_token_beyond(restarts: bool) -> None:
    limits = SchedulerLimits(8, 64, 64, 256, RopeBorder(10, restarts=restarts))
    scheduler = Scheduler(KVCacheManager(64, 4), limits)
    scheduler.add(make_request("a", 8))
    lengths = {}
    for _ in range(4):
        step(scheduler)
        (sequence,) = scheduler.live_sequences()
        lengths[len(sequence.token_ids)] = sequence.status
        if sequence.status is SequenceStatus.WAITING:
            assert sequence.num_computed_tokens == 0
    waits = [length for length, status in lengths.items() if status is SequenceStatus.WAITING]
    assert waits == ([11] if restarts else [])


def test_before_the_first_step_nothing_has_happened() -> None:
    known = asdict(StatsKeeper(make_scheduler(blocks=12)).current)
    assert (known.pop("blocks_total"), known.pop("blocks_free"), known.pop("last_error")) == (12, 12, None)
    assert set(known.values()) == {0}
