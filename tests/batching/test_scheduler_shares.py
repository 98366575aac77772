"""How the scheduler deals the work out to several steps in flight."""

from __future__ import annotations

from collections import deque

import pytest

from core.batching.scheduler import Scheduler
from core.batching.sequence import Request, Sequence
from core.batching.step import SchedulerLimits
from core.execution.records import SAMPLE, SampledToken, SchedulerOutput, StepOutput
from core.kv_cache.manager import KVCacheManager
from core.request import SamplingParams


def make_scheduler(count: int, prompt: int = 8) -> Scheduler:
    """With `count` requests waiting, each for far more tokens than a test takes."""
    scheduler = Scheduler(KVCacheManager(4096, 4, enable_prefix_caching=False), SchedulerLimits(64, 4096, 4096, 4096))
    for index in range(count):
        request = Request(f"r{index}", [3] * prompt, SamplingParams(ignore_eos=True), 1000, arrival=index)
        request.sequences = [Sequence(request, 0, 0, list(request.prompt_token_ids))]
        scheduler.add(request)
    return scheduler


def sampled_in(output: SchedulerOutput) -> list[int]:
    """Sequences of which the step samples the next token."""
    return output.record.seq_ids[(output.record.flags & SAMPLE) != 0].tolist()


def rounds(
    scheduler: Scheduler,
    cohorts: int,
    steps: int,
    chunk: int | None = None,
    flight: deque[SchedulerOutput] | None = None,
) -> list[SchedulerOutput]:
    """Keep `cohorts` steps in flight, beside those of `flight`; they come back in the order in which they left."""
    in_flight: deque[SchedulerOutput] = deque() if flight is None else flight
    seen = []
    while len(seen) < steps:
        while len(in_flight) < cohorts and (output := scheduler.schedule(cohorts, chunk)) is not None:
            in_flight.append(output)
        output = in_flight.popleft()
        sampled = {seq_id: SampledToken(5) for seq_id in sampled_in(output)}
        scheduler.update_from_output(output, StepOutput(output.step, sampled))
        seen.append(output)
    return seen


@pytest.mark.parametrize("count", range(1, 18))
@pytest.mark.parametrize("cohorts", [2, 3, 4])
def test_every_sequence_gets_its_turn(count: int, cohorts: int) -> None:
    scheduler = make_scheduler(count)
    rounds(scheduler, cohorts, 12 * cohorts)
    assert scheduler.num_running == count, "nobody waits for another to end"
    produced = [len(sequence.output_token_ids) for sequence in scheduler.live_sequences()]
    assert max(produced) - min(produced) <= 3
    assert min(produced) >= 8


@pytest.mark.parametrize("cohorts", [2, 3, 4])
def test_shares_are_about_even(cohorts: int) -> None:
    outputs = rounds(make_scheduler(24), cohorts, 10 * cohorts)
    sizes = [len(output.sequences) for output in outputs[2 * cohorts :]]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) == 24 // cohorts


@pytest.mark.parametrize(("count", "cohorts"), [(16, 5), (8, 5), (32, 7), (16, 3), (5, 4), (7, 4)])
def test_what_rounding_gives_one_step_the_next_ones_lack(count: int, cohorts: int) -> None:
    outputs = rounds(make_scheduler(count), cohorts, 8 * cohorts)[4 * cohorts :]
    sizes = [len(output.sequences) for output in outputs]
    assert max(sizes) - min(sizes) <= 1
    for start in range(0, len(sizes), cohorts):
        assert sum(sizes[start : start + cohorts]) == count, "as many steps in flight as were asked for, each one used"


def test_a_new_request_joins_the_first_step_with_room_and_shares_even_out() -> None:
    scheduler, flight = make_scheduler(8), deque[SchedulerOutput]()
    rounds(scheduler, 4, 16, flight=flight)
    late = Request("late", [3] * 8, SamplingParams(ignore_eos=True), 1000, arrival=99)
    late.sequences = [Sequence(late, 0, 0, list(late.prompt_token_ids))]
    scheduler.add(late)
    outputs = rounds(scheduler, 4, 16, flight=flight)
    joined = next(
        index for index, o in enumerate(outputs) if any(i.seq_id == late.sequences[0].seq_id for i in o.sequences)
    )
    assert joined < 4, "within a round"
    assert max(len(output.sequences) for output in outputs[4:]) == 3


def test_cohorts_are_rebalanced_as_requests_end() -> None:
    scheduler, flight = make_scheduler(12), deque[SchedulerOutput]()
    outputs = rounds(scheduler, 3, 12, flight=flight)
    assert {len(output.sequences) for output in outputs[6:]} == {4}
    ending = {item.seq_id for item in outputs[-1].sequences} | {outputs[-2].sequences[0].seq_id}
    for sequence in list(scheduler.live_sequences()):
        if sequence.seq_id in ending:
            scheduler.finish(sequence, "abort")
    assert len(ending) == 5, "all of one cohort and one of another"
    sizes = [len(output.sequences) for output in rounds(scheduler, 3, 12, flight=flight)[6:]]
    assert set(sizes) == {2, 3}
    assert sum(sizes) == 14


def test_what_decodes_is_no_prompt() -> None:
    scheduler = make_scheduler(3, prompt=50)
    assert scheduler.prompt_tokens_left == 50
    rounds(scheduler, 1, 2)
    assert scheduler.num_decoding == 3
    assert scheduler.prompt_tokens_left == 0, "or as many steps would be in flight as there are stages"


def test_a_long_context_counts_for_more() -> None:
    scheduler = make_scheduler(6)
    long = Request("long", [3] * 3900, SamplingParams(ignore_eos=True), 1000, arrival=99)
    long.sequences = [Sequence(long, 0, 0, list(long.prompt_token_ids))]
    scheduler.add(long)
    outputs = rounds(scheduler, 2, 20)
    beside = [
        len(o.sequences) - 1 for o in outputs[6:] if any(i.seq_id == long.sequences[0].seq_id for i in o.sequences)
    ]
    assert max(beside) <= 4 < 6


def test_a_prompt_may_have_a_chunk_in_every_step() -> None:
    scheduler = make_scheduler(1, prompt=100)
    first, second = scheduler.schedule(2, 40), scheduler.schedule(2, 40)
    assert first is not None
    assert second is not None
    assert [(o.sequences[0].start, o.sequences[0].end, sampled_in(o)) for o in (first, second)] == [
        (0, 40, []),
        (40, 80, []),
    ]
    third = scheduler.schedule(2, 40)
    assert third is not None
    assert sampled_in(third) == [third.sequences[0].seq_id]
    assert scheduler.schedule(2, 40) is None, "its next token is not known yet"
    for output in (first, second):
        assert scheduler.update_from_output(output, StepOutput(output.step)) == []
    (update,) = scheduler.update_from_output(third, StepOutput(3, {third.sequences[0].seq_id: SampledToken(7)}))
    assert update.token_id == 7


def test_a_sequence_that_ends_in_flight_keeps_its_blocks_until_all_its_steps_are_back() -> None:
    scheduler = make_scheduler(1, prompt=100)
    first, second = scheduler.schedule(2, 40), scheduler.schedule(2, 40)
    assert first is not None
    assert second is not None
    (sequence,) = scheduler.live_sequences()
    scheduler.finish(sequence, "abort")
    pool = scheduler.kv.pool
    assert pool.num_free < pool.num_blocks
    scheduler.update_from_output(first, StepOutput(1))
    assert pool.num_free < pool.num_blocks, "the second step may still write"
    scheduler.fail(second)
    assert pool.num_free == pool.num_blocks
    scheduler.check_invariants()
