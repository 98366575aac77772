"""What the engine decides: who runs, who gives way, what is shared, when a sequence ends, and what is counted."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pytest

from core.batching.intake import CircuitBreaker
from core.batching.output import RequestHandle, RequestWriter
from core.batching.publisher import Publisher
from core.batching.scheduler import MAX_FAILURES, MAX_MEMORY_FAILURES, Scheduler
from core.batching.sequence import Request, Sequence, SequenceStatus, SequenceUpdate, ending_of
from core.batching.step import SchedulerLimits
from core.errors import CircuitOpenError, StepFailedError
from core.execution.records import SAMPLE, SampledToken, SchedulerOutput, StepOutput
from core.kv_cache.manager import KVCacheManager
from core.request import FinishedRequest, RequestOutput, SamplingParams, TokenLogprob

BLOCK = 4
EOS, STOP, OTHER = 1, 2, 5


def make_request(
    name: str, prompt: list[int] | int, arrival: int = 0, *, n: int = 1, max_tokens: int = 100, **fields: Any
) -> Request:
    params = fields.pop("params", SamplingParams(ignore_eos=True))
    tokens = list(range(10 * arrival, 10 * arrival + prompt)) if isinstance(prompt, int) else prompt
    request = Request(name, tokens, params, max_tokens, arrival=arrival, **fields)
    request.sequences = [Sequence(request, index, 0, list(tokens)) for index in range(n)]
    return request


def make_scheduler(
    blocks: int = 64, *, batch: int = 8, budget: int = 64, chunk: int = 64, room: int = 256
) -> Scheduler:
    return Scheduler(KVCacheManager(blocks, BLOCK), SchedulerLimits(batch, budget, chunk, room))


def step(scheduler: Scheduler, token: int = OTHER) -> list[SequenceUpdate]:
    """One step that samples `token` wherever it samples."""
    output = scheduler.schedule()
    assert output is not None
    return land(scheduler, output, token)


def land(scheduler: Scheduler, output: SchedulerOutput, token: int = OTHER) -> list[SequenceUpdate]:
    sampling = output.record.seq_ids[(output.record.flags & SAMPLE) != 0].tolist()
    updates = scheduler.update_from_output(output, StepOutput(output.step, {i: SampledToken(token) for i in sampling}))
    scheduler.check_invariants()
    return updates


def computed(output: SchedulerOutput | None) -> list[tuple[int, int]]:
    assert output is not None
    return [(item.seq_id, item.end - item.start) for item in output.sequences]


# -- who runs ----------------------------------------------------------------------------------------------------------


def test_waiting_requests_start_by_priority_then_by_arrival() -> None:
    scheduler = make_scheduler(batch=2)
    for arrival, priority in enumerate((0, 5, -1, 0)):
        scheduler.add(make_request(f"r{arrival}", 8, arrival, priority=priority))
    assert {item.request.arrival for item in scheduler.waiting.foremost(2)} == {2, 0}
    step(scheduler)
    running = {s.request.request_id for s in scheduler.live_sequences() if s.status is SequenceStatus.RUNNING}
    assert running == {"r2", "r0"}


def test_decodes_come_before_a_prompt_and_the_prompt_gets_what_is_left() -> None:
    scheduler = make_scheduler(budget=10, chunk=8)
    decoding, long = make_request("a", 8, 0), make_request("b", 30, 1)
    scheduler.add(decoding)
    step(scheduler)
    scheduler.add(long)
    a, b = decoding.sequences[0].seq_id, long.sequences[0].seq_id
    first = scheduler.schedule()
    assert computed(first) == [(a, 1), (b, 8)], "a chunk is no longer than it may be"
    assert first is not None
    land(scheduler, first)
    assert scheduler.prompt_tokens_left == 22
    assert (scheduler.num_decoding, scheduler.num_running, scheduler.num_waiting) == (1, 2, 0)


def test_the_budget_bounds_a_step() -> None:
    scheduler = make_scheduler(budget=20, chunk=20)
    for arrival in range(3):
        scheduler.add(make_request(f"r{arrival}", 15, arrival))
    output = scheduler.schedule()
    assert [count for _, count in computed(output)] == [15, 5]
    assert scheduler.num_waiting == 1


def test_the_batch_size_bounds_who_runs() -> None:
    scheduler = make_scheduler(batch=2)
    for arrival in range(3):
        scheduler.add(make_request(f"r{arrival}", 4, arrival))
    step(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)


def test_mean_context_is_that_of_the_running_ones() -> None:
    scheduler = make_scheduler(batch=2)
    for arrival, prompt in enumerate((4, 10, 40)):
        scheduler.add(make_request(f"r{arrival}", prompt, arrival))
    assert scheduler.mean_context == 0
    step(scheduler)
    assert scheduler.mean_context == (5 + 11) // 2


# -- who gives way -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("priorities", "victim"), [((0, 0), "r1"), ((1, 0), "r0"), ((0, 1), "r1")])
def test_the_one_that_is_served_last_gives_way(priorities: tuple[int, int], victim: str) -> None:
    scheduler = make_scheduler(blocks=6)
    requests = [make_request(f"r{i}", 8, i, priority=priority) for i, priority in enumerate(priorities)]
    for request in requests:
        scheduler.add(request)
    while not scheduler.num_preemptions:
        step(scheduler)
    assert scheduler.num_preemptions == 1
    (waiting,) = [s for s in scheduler.live_sequences() if s.status is SequenceStatus.WAITING]
    assert waiting.request.request_id == victim
    assert waiting.num_preemptions == 1
    assert waiting.output_token_ids == [OTHER] * len(waiting.output_token_ids) != []
    assert (waiting.num_computed_tokens, waiting.num_told_tokens) == (0, 0)


def test_a_preempted_sequence_goes_on_where_it_was() -> None:
    scheduler = make_scheduler(blocks=6)
    first, second = make_request("a", 8, 0, max_tokens=12), make_request("b", 8, 1, max_tokens=12)
    scheduler.add(first)
    scheduler.add(second)
    for _ in range(80):
        if first.finished and second.finished:
            break
        step(scheduler)
    assert scheduler.num_preemptions > 0
    assert [len(s.output_token_ids) for s in (*first.sequences, *second.sequences)] == [12, 12]
    assert scheduler.kv.pool.num_referenced == 0


def test_what_is_in_flight_is_no_victim() -> None:
    scheduler = make_scheduler(blocks=4)
    scheduler.add(make_request("a", 7, 0))
    scheduler.add(make_request("b", 7, 1))
    output = scheduler.schedule()
    assert output is not None
    scheduler.keep_to_limit()
    assert scheduler.num_preemptions == 0
    scheduler.kv.pool.set_limit(2)
    scheduler.keep_to_limit()
    assert scheduler.num_preemptions == 0, "both are in flight"


# -- what is shared ----------------------------------------------------------------------------------------------------


def test_a_cached_prefix_is_not_computed_again_and_counts_as_a_hit() -> None:
    scheduler = make_scheduler()
    prompt = list(range(50, 62))
    first, second = make_request("a", prompt, 0, max_tokens=1), make_request("b", [*prompt, 99], 1)
    scheduler.add(first)
    step(scheduler)
    assert first.finished
    counts = scheduler.kv.prefix
    assert (counts.queried_tokens, counts.hit_tokens) == (12, 0)
    scheduler.add(second)
    assert computed(scheduler.schedule()) == [(second.sequences[0].seq_id, 1)]
    assert (counts.queried_tokens, counts.hit_tokens) == (25, 12)
    assert second.num_cached_tokens == 12


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    scheduler = make_scheduler()
    prompt = list(range(50, 58))
    scheduler.add(make_request("a", prompt, 0, max_tokens=1))
    step(scheduler)
    again = make_request("b", prompt, 1)
    scheduler.add(again)
    assert [count for _, count in computed(scheduler.schedule())] == [4]
    assert again.num_cached_tokens == 4


def test_other_owners_share_nothing() -> None:
    scheduler = make_scheduler()
    prompt = list(range(50, 62))
    scheduler.add(make_request("a", prompt, 0, max_tokens=1, owner="one"))
    step(scheduler)
    other = make_request("b", [*prompt, 99], 1, owner="other")
    scheduler.add(other)
    assert [count for _, count in computed(scheduler.schedule())] == [13]
    assert other.num_cached_tokens == 0


def test_a_prompt_whose_logprobs_are_asked_for_is_computed_whole() -> None:
    scheduler = make_scheduler()
    prompt = list(range(50, 62))
    scheduler.add(make_request("a", prompt, 0, max_tokens=1))
    step(scheduler)
    request = make_request("b", prompt, 1, params=SamplingParams(prompt_logprobs=0, ignore_eos=True))
    request.prompt_logprobs = [None]
    scheduler.add(request)
    assert [count for _, count in computed(scheduler.schedule())] == [12]


def test_a_prompt_that_leaves_the_cache_alone_is_computed_whole() -> None:
    scheduler = make_scheduler()
    prompt = list(range(50, 62))
    scheduler.add(make_request("a", prompt, 0, max_tokens=1))
    step(scheduler)
    scheduler.add(make_request("b", prompt, 1, params=SamplingParams(cache_prompt=False, ignore_eos=True)))
    assert [count for _, count in computed(scheduler.schedule())] == [12]


def test_siblings_wait_for_the_prompt_and_compute_its_last_token_alone() -> None:
    scheduler = make_scheduler(chunk=8)
    request = make_request("a", 12, 0, n=3)
    scheduler.add(request)
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 3)
    step(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 2), "a part of the prompt is not enough"
    step(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting) == (3, 0)
    ids = [sequence.seq_id for sequence in request.sequences]
    assert sorted(computed(scheduler.schedule())) == sorted([(ids[0], 1), (ids[1], 1), (ids[2], 1)])


def test_siblings_for_which_the_batch_has_no_room_wait_like_others() -> None:
    scheduler = make_scheduler(batch=2)
    scheduler.add(make_request("a", 8, 0, n=3))
    step(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)


def test_siblings_of_one_that_ends_before_its_prompt_compute_it_themselves() -> None:
    scheduler = make_scheduler()
    request = make_request("a", 8, 0, n=2)
    scheduler.add(request)
    scheduler.finish(request.sequences[0], "abort")
    assert scheduler.num_waiting == 1
    assert computed(scheduler.schedule()) == [(request.sequences[1].seq_id, 8)]


# -- when a sequence ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("produced", "fields", "ending"),
    [
        ([OTHER], {}, None),
        ([EOS], {}, ("stop", None)),
        ([STOP], {}, ("stop", STOP)),
        ([EOS], {"ignore_eos": True}, None),
        ([STOP], {"ignore_eos": True}, ("stop", STOP)),
        ([OTHER, EOS], {"min_tokens": 2}, ("stop", None)),
        ([OTHER, EOS], {"min_tokens": 3}, None),
        ([OTHER, STOP], {"min_tokens": 2}, ("stop", STOP)),
        ([OTHER, STOP], {"min_tokens": 3}, None),
        ([OTHER] * 4, {}, None),
        ([OTHER] * 5, {}, ("length", None)),
        ([OTHER] * 4 + [STOP], {}, ("stop", STOP)),
    ],
)
def test_a_token_is_the_last(produced: list[int], fields: dict[str, Any], ending: Any) -> None:
    request = make_request("a", 3, params=SamplingParams(**fields), max_tokens=5)
    request.stop_token_ids, request.eos_token_ids = frozenset({STOP}), frozenset({EOS})
    sequence = request.sequences[0]
    for token in produced:
        sequence.append(token)
    assert ending_of(sequence, 100) == ending


def test_the_context_ends_a_sequence() -> None:
    request = make_request("a", 3, max_tokens=50)
    sequence = request.sequences[0]
    sequence.append(OTHER)
    assert ending_of(sequence, 5) is None
    sequence.append(OTHER)
    assert ending_of(sequence, 5) == ("length", None)


@pytest.mark.parametrize(("max_tokens", "given", "room", "fits"), [(10, 10, 18, True), (10, 10, 17, False)])
def test_what_was_asked_for_has_to_fit(max_tokens: int, given: int, room: int, fits: bool) -> None:
    request = make_request("a", 8, params=SamplingParams(max_tokens=given), max_tokens=max_tokens)
    assert request.fit_into(room) is fits
    assert request.most_tokens == 18


def test_an_answer_of_no_given_length_takes_the_room_there_is() -> None:
    request = make_request("a", 8, params=SamplingParams(max_tokens=None), max_tokens=100)
    assert request.fit_into(20)
    assert request.max_tokens == 12
    assert not make_request("b", 8, params=SamplingParams(max_tokens=None)).fit_into(8)


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_sequence_that_steps_fail_with_is_tried_alone_and_then_given_up() -> None:
    scheduler = make_scheduler()
    bad, good = make_request("bad", 8, 0), make_request("good", 8, 1)
    for request in (bad, good):
        scheduler.add(request)
    ended: list[Sequence] = []
    for tries in range(1, MAX_FAILURES + 1):
        output = scheduler.schedule()
        assert output is not None
        if tries > 1:
            assert computed(output) == [(bad.sequences[0].seq_id, 8)], "alone, since it is suspected"
        ended = scheduler.fail(output)
        if tries == 1:
            good.sequences[0].num_failures = 0
    assert ended == bad.sequences
    assert bad.sequences[0].finish_reason == "error"
    assert [item for item, _ in computed(scheduler.schedule())] == [good.sequences[0].seq_id]
    scheduler.check_invariants()


def test_memory_that_runs_out_makes_steps_smaller_and_they_grow_again() -> None:
    scheduler = make_scheduler(budget=64, chunk=64)
    scheduler.add(make_request("a", 60, 0))
    sizes = []
    for _ in range(3):
        output = scheduler.schedule()
        assert output is not None
        sizes.append(output.num_tokens)
        assert scheduler.fail(output, memory=True) == []
    assert sizes == [60, 30, 15]
    grown = []
    for _ in range(4):
        output = scheduler.schedule()
        assert output is not None
        grown.append(output.num_tokens)
        land(scheduler, output)
    assert grown[:3] == [7, 8, 9]


def test_memory_may_run_out_more_often_than_a_step_may_fail() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 8, 0))
    tries = 0
    while True:
        output = scheduler.schedule()
        assert output is not None
        tries += 1
        if scheduler.fail(output, memory=True):
            break
    assert tries == MAX_MEMORY_FAILURES


def test_a_failure_without_blame_counts_for_nothing() -> None:
    scheduler = make_scheduler()
    request = make_request("a", 8, 0)
    scheduler.add(request)
    for _ in range(3 * MAX_FAILURES):
        output = scheduler.schedule()
        assert output is not None
        assert scheduler.fail(output, blame=False) == []
    assert request.sequences[0].num_failures == 0


def test_a_step_that_failed_leaves_nothing_in_the_prefix_cache() -> None:
    scheduler = make_scheduler()
    prompt = list(range(50, 62))
    request = make_request("a", prompt, 0)
    scheduler.add(request)
    output = scheduler.schedule()
    assert output is not None
    scheduler.fail(output)
    scheduler.finish(request.sequences[0], "abort")
    other = make_request("b", prompt, 1)
    scheduler.add(other)
    assert [count for _, count in computed(scheduler.schedule())] == [12]


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_the_breaker_opens_after_so_many_failures_in_a_row_and_tries_again_later() -> None:
    clock = Clock()
    breaker = CircuitBreaker(3, 10.0, clock)
    for _ in range(2):
        breaker.record_failure("x")
    breaker.record_success()
    for number in range(1, 4):
        assert breaker.state == "closed"
        breaker.check()
        breaker.record_failure("out of luck")
        assert breaker.consecutive_failures == number
    assert breaker.state == "open"
    clock.now_s += 4
    with pytest.raises(CircuitOpenError, match=r"3 steps in a row have failed \(last: out of luck\).* 6 s") as error:
        breaker.check()
    assert error.value.retry_after_s == 6.0
    clock.now_s += 5.5
    with pytest.raises(CircuitOpenError) as error:
        breaker.check()
    assert error.value.retry_after_s == 1.0
    clock.now_s += 0.5
    assert breaker.state == "half_open"
    breaker.check()
    breaker.record_failure("again")
    assert breaker.state == "open"
    clock.now_s += 10
    breaker.record_success()
    assert (breaker.state, breaker.consecutive_failures) == ("closed", 0)


# -- what clients get and what is counted ------------------------------------------------------------------------------


class Words:
    """A detokenizer of which each token is a word."""

    special_tokens: Mapping[int, str] = {}

    def stream(self, prompt_token_ids: list[int], *, skip_special_tokens: bool, kept: Collection[int] = ()) -> Words:
        return self

    def push(self, token_id: int) -> str:
        if token_id < 0:
            raise ValueError("no such token")
        return f"{token_id} "

    def flush(self) -> str:
        return ""


class Metrics:
    def __init__(self) -> None:
        self.first: list[float] = []
        self.between: list[float] = []
        self.tokens = 0
        self.ends: list[FinishedRequest] = []

    def observe_first_token(self, seconds: float, prompt_tokens: int, request_id: str, trace_id: str) -> None:
        self.first.append(seconds)

    def observe_tokens(self, count: int, seconds: float | None) -> None:
        self.tokens += count
        if seconds is not None:
            self.between.append(seconds)

    def observe_finished(self, request: FinishedRequest) -> None:
        self.ends.append(request)

    @property
    def finished(self) -> list[tuple[int, int, str]]:
        return [(end.prompt_tokens, end.output_tokens, end.reason) for end in self.ends]


class Desk:
    """A publisher, the scheduler behind it, and what it tells."""

    def __init__(self, **limits: Any) -> None:
        self.scheduler = make_scheduler(**limits)
        self.ended: list[str] = []
        self.publisher = Publisher(self.scheduler, Words(), self.ended.append)
        self.metrics = self.publisher.metrics = Metrics()
        self.publisher.observers = (self.metrics,)

    def open(self, request: Request) -> RequestHandle:
        handle = RequestHandle(request.request_id, request.params, lambda request_id: None)
        assert self.publisher.open(request, handle)
        self.scheduler.add(request)
        return handle

    def publish(self, updates: list[SequenceUpdate]) -> None:
        self.publisher.send(self.publisher.prepare(updates))

    def step(self, token: int = OTHER) -> None:
        self.publish(step(self.scheduler, token))


def test_each_output_tells_what_was_added_and_the_last_one_why_it_ended() -> None:
    desk = Desk()
    handle = desk.open(make_request("a", 8, max_tokens=2))
    desk.step()
    first = handle.get(0)
    assert first is not None
    assert (first.deltas[0].text, first.deltas[0].token_ids, first.finished) == ("5 ", (5,), False)
    assert not handle.finished
    desk.step()
    last = handle.get(0)
    assert last is not None and last.finished and handle.finished
    assert [(delta.text, delta.finish_reason) for delta in last.deltas] == [("5 ", None), ("", "length")]
    assert (desk.ended, handle.get(0)) == (["a"], None)


def test_tokens_of_all_samples_are_counted_once_when_the_request_ends() -> None:
    desk = Desk()
    handle = desk.open(make_request("a", 8, n=3, max_tokens=4))
    while not handle.finished:
        desk.step()
    assert desk.metrics.finished == [(8, 12, "length")]
    assert (len(desk.metrics.first), desk.metrics.tokens) == (1, 12)
    assert len(desk.metrics.between) == len(list(iter(lambda: handle.get(0), None))) - 1


def test_latencies_are_what_passed_since_submission_and_since_the_token_before(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk()
    request = make_request("a", 8, max_tokens=3)
    request.submitted_s = 1.0
    desk.open(request)
    for now_s in (2.0, 6.0, 7.5):
        monkeypatch.setattr("core.batching.publisher.time.monotonic", lambda now_s=now_s: now_s)
        desk.step()
    assert desk.metrics.first == [1.0]
    assert desk.metrics.between == [4.0, 1.5]
    (end,) = desk.metrics.ends
    assert (end.submitted_s, end.started_s, end.first_token_s, end.ended_s) == (1.0, 2.0, 2.0, 7.5)


def test_a_request_that_never_ran_has_no_start() -> None:
    desk = Desk()
    desk.open(make_request("a", 8, max_tokens=3))
    assert desk.publisher.abort("a")
    (end,) = desk.metrics.ends
    assert (end.reason, end.started_s, end.first_token_s) == ("abort", None, None)


def test_an_error_of_one_sample_ends_its_siblings_and_no_other_request() -> None:
    desk = Desk()
    handle, other = desk.open(make_request("a", 8, 0, n=2)), desk.open(make_request("b", 8, 1))
    desk.step()
    output = desk.scheduler.schedule()
    assert output is not None
    failing = output.sequences[0].seq_id
    result = StepOutput(
        output.step,
        {item.seq_id: SampledToken(OTHER) for item in output.sequences if item.seq_id != failing},
        failed={failing: "no number"},
    )
    desk.publish(desk.scheduler.update_from_output(output, result))
    assert handle.get(0) is not None
    with pytest.raises(StepFailedError, match="no number"):
        handle.get(0)
    assert desk.ended == ["a"]
    assert desk.metrics.finished == [(8, 2, "error")]
    assert desk.scheduler.num_running == 1 and not other.finished
    told = [other.get(0) for _ in range(2)]
    assert [output.deltas[0].token_ids for output in told if output is not None] == [(OTHER,), (OTHER,)]
    desk.scheduler.check_invariants()


def test_text_that_cannot_be_made_fails_its_own_request_alone() -> None:
    desk = Desk()
    handle, other = desk.open(make_request("a", 8, 0)), desk.open(make_request("b", 8, 1))
    updates = step(desk.scheduler)
    bad = [SequenceUpdate(u.sequence, -1 if u.sequence.request.request_id == "a" else OTHER) for u in updates]
    desk.publish(bad)
    with pytest.raises(StepFailedError, match="could not be decoded: no such token"):
        handle.get(0)
    assert other.get(0) is not None and not other.finished


def test_an_aborted_request_gets_what_it_has() -> None:
    desk = Desk()
    handle = desk.open(make_request("a", 8))
    desk.step()
    assert desk.publisher.abort("a")
    assert not desk.publisher.abort("a")
    assert handle.result(0).completions[0].finish_reason == "abort"
    assert desk.metrics.finished == [(8, 1, "abort")]
    assert desk.scheduler.num_running == 0 and desk.scheduler.kv.pool.num_referenced == 0


def test_a_stop_string_ends_the_sequence_at_once() -> None:
    desk = Desk()
    handle = desk.open(make_request("a", 8, params=SamplingParams(stop=("7 ",), ignore_eos=True)))
    desk.step(6)
    desk.step(7)
    result = handle.result(0)
    (completion,) = result.completions
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("6 ", "stop", "7 ")
    assert result.num_generated_tokens == 2
    assert desk.scheduler.num_running == 0


def test_the_end_of_the_engine_reaches_every_client() -> None:
    desk = Desk()
    handles = [desk.open(make_request(f"r{i}", 8, i)) for i in range(3)]
    desk.publisher.fail_everything(StepFailedError("the end"))
    for handle in handles:
        with pytest.raises(StepFailedError, match="the end"):
            handle.get(0)
    assert desk.ended == ["r0", "r1", "r2"]
    assert [reason for *_, reason in desk.metrics.finished] == ["error"] * 3


def test_another_publisher_goes_on_with_the_same_writers_in_their_order() -> None:
    desk, other = Desk(), Desk()
    requests = [make_request(f"r{i}", 8, 2 - i) for i in range(3)]
    for request in requests:
        desk.open(request)
    writers = desk.publisher.release()
    assert [writer.request.request_id for writer in writers] == ["r2", "r1", "r0"]
    assert desk.publisher.release() == []
    for writer in writers:
        other.publisher.take(writer)
        other.scheduler.adopt(writer.request)
    other.step()
    assert all(isinstance(writer.handle.get(0), RequestOutput) for writer in writers)


def test_after_a_loss_the_shortest_streams_go_on_first_and_before_those_that_have_not_begun() -> None:
    desk, other = Desk(batch=3), Desk(batch=1)
    for name, prompt, arrival in (("long", 30, 0), ("short", 5, 1), ("middle", 12, 2), ("waits", 2, 3)):
        desk.open(make_request(name, prompt, arrival))
    urgent = make_request("urgent", 40, 9, priority=-1)
    desk.step()
    desk.scheduler.start_over()
    desk.open(urgent)
    for writer in desk.publisher.release():
        other.publisher.take(writer)
        other.scheduler.adopt(writer.request)
    assert [s.request.request_id for s in sorted(other.scheduler.waiting, key=lambda s: s.queue_key)] == [
        "urgent", "short", "middle", "long", "waits",
    ]  # fmt: skip
    other.step()
    assert not urgent.sequences[0].interrupted
    assert other.scheduler.waiting.first is not None and other.scheduler.waiting.first.request.request_id == "short"


def test_a_stream_that_goes_on_is_preempted_by_arrival_as_before() -> None:
    scheduler = make_scheduler()
    first, second = make_request("first", 20, 0), make_request("second", 4, 1)
    for request in (first, second):
        scheduler.add(request)
    step(scheduler)
    scheduler.start_over()
    step(scheduler)
    assert [s.interrupted for request in (first, second) for s in request.sequences] == [False, False]
    assert second.sequences[0].queue_key > first.sequences[0].queue_key


def test_prompt_logprobs_are_sent_with_the_first_output_alone() -> None:
    request = make_request("a", 2)
    request.prompt_logprobs = [None, TokenLogprob(3, -1.0, ())]
    handle = RequestHandle("a", request.params, lambda request_id: None)
    writer = RequestWriter(request, handle, Words())
    writer.write([])
    writer.write([])
    first, second = handle.get(0), handle.get(0)
    assert first is not None and second is not None
    assert first.prompt_logprobs == tuple(request.prompt_logprobs)
    assert second.prompt_logprobs is None


@pytest.mark.parametrize(("n", "best"), [(1, [2]), (2, [2, 0])])
def test_best_of_gives_the_likeliest_by_the_mean_of_their_tokens(n: int, best: list[int]) -> None:
    desk = Desk()
    request = make_request("a", 8, n=3, max_tokens=2, params=SamplingParams(n=n, best_of=3, ignore_eos=True))
    handle = desk.open(request)
    step(desk.scheduler)
    likely = {0: -2.0, 1: -3.0, 2: -1.0}
    for _ in range(3):
        output = desk.scheduler.schedule()
        if output is None:
            break
        names = {s.seq_id: s.index for s in request.sequences}
        sampled = {
            item.seq_id: SampledToken(OTHER + names[item.seq_id], TokenLogprob(OTHER, likely[names[item.seq_id]], ()))
            for item in output.sequences
        }
        desk.publish(desk.scheduler.update_from_output(output, StepOutput(output.step, sampled)))
    result = handle.result(0)
    assert [completion.token_ids[-1] - OTHER for completion in result.completions] == best
    assert [completion.index for completion in result.completions] == list(range(n))
    assert result.num_generated_tokens >= 5, "what was thrown away was generated too"
