"""Which sequences compute which tokens in the next step, and what becomes of them afterwards.

A sequence is a list of tokens of which some have KV; a step computes some of the others. Decoding, prefill, chunked
prefill and recomputation after a preemption are all that one thing. In order:

1. running sequences that need a single token (decodes), so that a long prompt never delays them;
2. running sequences with more to compute, in chunks;
3. waiting sequences by priority and arrival, while the batch, the token budget and the blocks last.

Several steps may be in flight, one behind the other through the stages. Each takes its share of the work: sequences
are weighed by what a decode of theirs costs, those that have waited longest go first, and what is over goes into the
next step. So the steps in flight are the cohorts of a pipeline; a new request joins the one that has room first, and
they even out by themselves as requests end. A long prompt may have a chunk in each.

When a running sequence needs a block and none is free, the running sequence that is served last gives up its blocks
and waits, to be recomputed (mostly from the prefix cache). So do the sequences of a step that failed: each is tried
again in a step of its own, so that one whose own fault it is fails alone, and after a few failures for good. Siblings
of one request (`n`, `best_of`) fork once the first has its prompt computed: they share its blocks and recompute the
last prompt token alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from core.batching.running import RunningSequences
from core.batching.sequence import Request, Sequence, SequenceStatus, SequenceUpdate, ending_of
from core.batching.step import SchedulerLimits, StepDraft, record_of, relaxed, weight_of
from core.batching.waiting import WaitingSequences
from core.errors import StepFailedError
from core.execution.records import ScheduledSequence, SchedulerOutput, StepOutput, StepRecord
from core.kv_cache.block_table import PrefixChain
from core.kv_cache.manager import KVCacheManager
from core.request import FinishReason

MAX_FAILURES = 3
"""A sequence that so many steps have failed with is not tried again."""
MAX_MEMORY_FAILURES = 12
"""The same where memory ran out: every try computes half as many tokens."""


class Scheduler:
    """Owns the waiting sequences, the running list and the block tables. Used by the engine thread alone."""

    def __init__(self, kv: KVCacheManager, limits: SchedulerLimits, running: RunningSequences | None = None) -> None:
        """`running` is the list that the scheduler keeps; others may look at it."""
        self.kv = kv
        self.limits = limits
        self.num_preemptions = 0
        self.waiting = WaitingSequences(kv)
        self._running = running if running is not None else RunningSequences()
        self._ended: list[int] = []
        self._steps = 0
        self._token_cap: int | None = None  # since memory ran out in a step
        self._after_raw = False  # the last step did not sample; the next one is for those that waited for it
        self._ahead = 0.0  # what rounding up gave the last step beyond its share; the next one gets so much less
        self._blocked: tuple[int, int] | None = None

    @property
    def has_work(self) -> bool:
        """Whether something runs or could: a sequence whose prefix is on its way up, and siblings that wait for it,
        need nothing until then."""
        return self.waiting.first is not None or bool(self._running)

    @property
    def prompt_tokens_left(self) -> int:
        """Most tokens of a prompt that a running or the next waiting sequence has to compute. Decodes have none."""
        first = self.waiting.first
        waiting = len(first.token_ids) if first is not None else 0
        return max([waiting, *(s.num_unscheduled for s in self._running if s.num_unscheduled > 1)])

    @property
    def num_decoding(self) -> int:
        """Running sequences that compute one token at a time."""
        return sum(1 for s in self._running if s.num_unscheduled <= 1)

    @property
    def mean_context(self) -> int:
        """Mean tokens of the running sequences."""
        return sum(len(s.token_ids) for s in self._running) // max(1, len(self._running))

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return self.waiting.total

    def add(self, request: Request) -> None:
        """Queue a request's sequences."""
        for sequence in request.sequences:
            sequence.chain = self._chain(sequence)
        self.waiting.add(request)

    def adopt(self, request: Request) -> None:
        """Queue what is not finished of a request that another scheduler has begun; it holds nothing any more."""
        first = request.sequences[0]
        for sequence in request.sequences:
            if sequence.finished:
                continue
            sequence.chain = self._chain(sequence)
            sequence.start_over()
            if sequence.status is SequenceStatus.FORKING and not first.finished:
                self.waiting.hold(sequence)
            else:
                self.waiting.push(sequence)

    def _chain(self, sequence: Sequence) -> PrefixChain:
        rope = self.limits.rope
        variant = rope.variant(sequence.num_prompt_tokens, len(sequence.token_ids)) if rope is not None else b""
        return self.kv.chain(sequence.request.owner, variant)

    # -- one step ---------------------------------------------------------------------------------------------------

    def schedule(self, cohorts: int = 1, chunk: int | None = None) -> SchedulerOutput | None:
        """Decide the next step; None if there is nothing that could run now.

        It takes one of `cohorts` equal shares of the work, and at most `chunk` tokens of a prompt.
        """
        budget = min(self.limits.max_num_batched_tokens, self._token_cap or 1 << 30)
        step = StepDraft(budget, min(chunk or 1 << 30, self.limits.prefill_chunk_size, budget))
        if cohorts > 1:
            even = self._total_weight() / cohorts
            step.share = even - min(self._ahead, even)
        ready = sorted((s for s in self._running if s.num_unscheduled > 0 and not s.replays), key=lambda s: s.last_step)
        alone = [s for s in ready if s.is_alone]
        self._schedule_alone(step, [s for s in alone if s.num_failures], lambda s: s.num_failures > 0)
        if not (step.chosen or self._after_raw):
            self._schedule_alone(step, alone, lambda s: s.is_alone)
        if step.chosen:
            return self._output(step)
        ready = [s for s in ready if not s.is_alone]
        for sequence in sorted(ready, key=lambda s: s.num_unscheduled > 1):
            self._schedule_running(step, sequence)
        self._admit(step)
        if not step.chosen and alone:
            self._schedule_running(step, alone[0])
        if not step.chosen:
            return None
        self._ahead = max(0.0, step.weight - step.share) if cohorts > 1 else 0.0
        return self._output(step)

    def _schedule_alone(self, step: StepDraft, running: list[Sequence], waits: Callable[[Sequence], bool]) -> None:
        """Nothing but the first of those that come into steps of their own, be it running or the next that `waits`."""
        if running:
            self._schedule_running(step, running[0])
        elif (first := self.waiting.first) is not None and waits(first):
            self._admit(step)

    def _total_weight(self) -> float:
        """Of what runs, and of what would run if blocks were plenty."""
        room = self.limits.max_batch_size - len(self._running)
        return sum(map(weight_of, self._running)) + sum(map(weight_of, self.waiting.foremost(room)))

    def _schedule_running(self, step: StepDraft, sequence: Sequence) -> None:
        """Give a running sequence its tokens, preempting those served after it if blocks run out."""
        if sequence.status is not SequenceStatus.RUNNING or step.budget == 0 or not step.has_room():
            return
        num_new = min(sequence.num_unscheduled, step.budget, step.chunk)
        while not self._grow(step, sequence, num_new):
            victim = self._victim()
            if victim is None:
                return
            self._preempt(step, victim)
            if victim is sequence:
                return

    def _grow(self, step: StepDraft, sequence: Sequence, num_new: int) -> bool:
        start = sequence.num_scheduled_tokens
        if not self.kv.grow(sequence.seq_id, start, start + num_new):
            return False
        step.take(sequence, num_new)
        return True

    def upkeep(self) -> SchedulerOutput | None:
        """A step that computes nothing, if pages wait to be moved."""
        if not self.kv.pages.has_ops:
            return None
        self._steps += 1
        return SchedulerOutput(StepRecord(self._steps), self.kv.take_step(self._steps))

    @property
    def waiting_blocks(self) -> int:
        """Blocks that the next waiting sequence needs at most."""
        first = self.waiting.first
        return self.kv.blocks_for(len(first.token_ids) + 1) if first is not None else 0

    def keep_to_limit(self) -> None:
        """After memory was given back: preempt until the blocks in use fit into what is left."""
        pool = self.kv.pool
        while pool.num_referenced > pool.limit and (victim := self._victim()) is not None:
            self._preempt(StepDraft(0, 0), victim)
            self.kv.refresh_limit()

    def drop_unwanted(self) -> None:
        """Sequences that are better computed again than read where they are."""
        for sequence in [s for s in self._running if s.seq_id in self.kv.unwanted and not s.in_flight]:
            self._preempt(StepDraft(0, 0), sequence, self.kv.close_and_drop_away)
        self.kv.unwanted.clear()

    def _victim(self) -> Sequence | None:
        """The running sequence that is served last; None while all of them are in flight."""
        return max((s for s in self._running if not s.in_flight), key=lambda s: s.sort_key, default=None)

    def _preempt(self, step: StepDraft, sequence: Sequence, close: Callable[[int], None] | None = None) -> None:
        step.drop(sequence)
        self._running.remove(sequence)
        (close or self.kv.close)(sequence.seq_id)
        self._ended.append(sequence.seq_id)
        sequence.start_over()
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.push(sequence)

    def _admit(self, step: StepDraft) -> None:
        """Start waiting sequences in order; the first that does not fit ends it, so nobody is overtaken for ever. One
        that a step has failed with comes into a step of its own."""
        while (sequence := self.waiting.first) is not None and step.budget > 0:
            if sequence.is_alone and step.chosen:
                return
            if len(self._running) >= self.limits.max_batch_size or not step.has_room():
                return
            if self._blocked == (sequence.seq_id, self.kv.pool.num_free) and self._running:
                return
            if self.waiting.fetches(sequence):
                self.waiting.pop()
                continue
            if not self._start(step, sequence):
                sequence.prefetched = False  # by the time there is room, other blocks may be gone
                self._blocked = (sequence.seq_id, self.kv.pool.num_free)
                return
            self.waiting.pop()
            if sequence.is_alone:
                return

    def _start(self, step: StepDraft, sequence: Sequence) -> bool:
        """Take a sequence's cached prefix and first chunk; with nothing else running it may take the last block."""
        request = sequence.request
        chain, read_prefix = sequence.chain, request.reads_prefix
        cached = self.kv.open(sequence.seq_id, sequence.token_ids, read_prefix=read_prefix, chain=chain)
        num_new = min(len(sequence.token_ids) - cached, step.budget, step.chunk)
        needed = self.kv.blocks_needed(sequence.seq_id, cached, len(sequence.token_ids))
        if self._running and not self.kv.ensure_free(needed + len(self._running)):
            self.kv.close(sequence.seq_id)
            return False
        sequence.rewind(cached)
        if not self._grow(step, sequence, num_new):
            self.kv.close(sequence.seq_id)
            sequence.start_over()
            return False
        if request.started_s is None and sequence.index == 0:
            request.num_cached_tokens = min(cached, sequence.num_prompt_tokens)
            self.kv.prefix.queried_tokens += sequence.num_prompt_tokens
            self.kv.prefix.hit_tokens += request.num_cached_tokens
        if request.started_s is None:
            request.started_s = time.monotonic()
        sequence.status, sequence.interrupted = SequenceStatus.RUNNING, False
        self._running.append(sequence)
        return True

    def _output(self, step: StepDraft) -> SchedulerOutput:
        chosen = step.in_order()
        self._after_raw = chosen[0][0].request.raw is not None
        self._steps += 1
        record, self._ended = record_of(self._steps, chosen, self._ended, self.kv), []
        for sequence, num_new in chosen:
            sequence.in_flight += 1
            sequence.num_scheduled_tokens += num_new
            sequence.last_step = self._steps
        self._running.meter.begun(self._steps)
        return SchedulerOutput(record, self.kv.take_step(self._steps))

    # -- after the step ---------------------------------------------------------------------------------------------

    def update_from_output(self, output: SchedulerOutput, result: StepOutput) -> list[SequenceUpdate]:
        """Advance the step's sequences; returns one update for each that gained a token or failed."""
        self.kv.step_done(output.step)
        self._running.meter.ended(output)
        self._token_cap = None if self._token_cap is None else relaxed(self._token_cap, self.limits)
        if result.stage_s:
            self._running.credit(output.record, result.stage_s)
        running = {sequence.seq_id: sequence for sequence in self._running}
        updates, rope = [], self.limits.rope
        for item in output.sequences:
            sequence = running.get(item.seq_id)
            if sequence is None:
                continue
            sequence.in_flight -= 1
            if sequence.finished or sequence.replays:
                self._leave(sequence)
                continue
            if item.end >= sequence.failed_at:
                sequence.num_failures = 0
            sequence.num_computed_tokens = item.end
            self.kv.commit(item.seq_id, sequence.token_ids, item.end)
            self._record_prompt_logprobs(sequence, item, result)
            self._fork_siblings(sequence)
            if sequence.request.raw is not None:
                updates += self._record_raw(sequence, item, result)
                continue
            sampled, failure = result.sampled.get(item.seq_id), result.failed.get(item.seq_id)
            if failure is not None:
                self.finish(sequence, "error")
                updates.append(SequenceUpdate(sequence, error=StepFailedError(failure)))
            elif sampled is not None:
                sequence.append(sampled.token_id)
                ending = ending_of(sequence, self.limits.max_model_len)
                if ending is not None:
                    self.finish(sequence, *ending)
                elif rope is not None and rope.restarts and len(sequence.token_ids) == rope.tokens + 1:
                    sequence.chain, sequence.replays = self._chain(sequence), True
                    self._leave(sequence)
                updates.append(SequenceUpdate(sequence, sampled.token_id, sampled.logprob))
        return updates

    def _record_raw(self, sequence: Sequence, item: ScheduledSequence, result: StepOutput) -> list[SequenceUpdate]:
        raw = sequence.request.raw
        if raw is not None and result.raw is not None:
            raw.add(item.start, result.raw)
        if item.end < len(sequence.token_ids):
            return []
        self.finish(sequence, "stop")
        return [SequenceUpdate(sequence)]

    def _record_prompt_logprobs(self, sequence: Sequence, item: ScheduledSequence, result: StepOutput) -> None:
        rows, recorded = result.prompt_logprobs.get(item.seq_id), sequence.request.prompt_logprobs
        if rows is not None and recorded is not None:
            recorded.extend(rows[len(recorded) - item.start - 1 :])

    def _fork_siblings(self, sequence: Sequence) -> None:
        """Once the first sequence's prompt has KV, its siblings start from it."""
        if sequence.num_computed_tokens < sequence.num_prompt_tokens:
            return
        for sibling in self.waiting.take_siblings(sequence):
            if len(self._running) < self.limits.max_batch_size:
                sibling.rewind(sibling.num_prompt_tokens - 1)
                self.kv.fork(sequence.seq_id, sibling.seq_id, sibling.num_computed_tokens, sibling.chain)
                sibling.status = SequenceStatus.RUNNING
                self._running.append(sibling)
            else:
                self.waiting.push(sibling)

    def finish(self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End a sequence. Its blocks go back at once, or when the steps it is part of have come back."""
        if sequence.finished:
            return
        was, sequence.status = sequence.status, SequenceStatus.FINISHED
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        if was is not SequenceStatus.RUNNING:
            self.waiting.remove(sequence, was)
        elif not sequence.in_flight:
            self.waiting.release_siblings(sequence)
            self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """A sequence that has ended, or has to be computed anew, gives up its blocks once it is part of no step."""
        if sequence not in self._running or sequence.in_flight:
            return
        if sequence.replays and not sequence.finished:
            self._preempt(StepDraft(0, 0), sequence)
            return
        self._running.remove(sequence)
        self.kv.close(sequence.seq_id)
        self._ended.append(sequence.seq_id)

    def fail(
        self, output: SchedulerOutput, *, moved: bool = True, memory: bool = False, blame: bool = True
    ) -> list[Sequence]:
        """The step failed, and none of its tokens have KV. Its sequences are computed again; returns those that have
        failed too often and are ended.

        Not `moved`: the step left pages undone, so nothing that is computed can be relied on, and all that runs is
        computed again. `memory`: it ran out, so the next steps are smaller. Without `blame` it does not count.
        """
        self.kv.step_done(output.step, moved=moved)
        self._running.meter.failed(output.step)
        if memory:
            self._token_cap = max(1, output.num_tokens // 2)
        running = {sequence.seq_id: sequence for sequence in self._running}
        self._ended.extend(i for i in output.record.ended.tolist() if i not in running)  # may not have been come to
        rows = [(running[item.seq_id], item) for item in output.sequences if item.seq_id in running]
        ended = []
        for sequence, item in rows:
            sequence.in_flight -= 1
            sequence.num_failures += blame and not sequence.replays  # pieces of it behind one that failed say no more
            sequence.failed_at = max(sequence.failed_at, item.end)
            if sequence.num_failures >= (MAX_MEMORY_FAILURES if memory else MAX_FAILURES) and not sequence.finished:
                self.finish(sequence, "error")
                ended.append(sequence)
        for sequence in [sequence for sequence, _ in rows] if moved else list(self._running):
            sequence.replays = True
            self._leave(sequence)
        if not moved:
            self.kv.forget_cached()
        return ended

    def live_sequences(self) -> Iterable[Sequence]:
        """Every sequence that is not finished."""
        yield from self.waiting
        yield from self._running

    def start_over(self) -> None:
        """Every sequence that is not finished is computed from its first token, by stages that know none. While nothing
        is in flight."""
        for sequence in list(self._running):
            sequence.interrupted = True
            self._preempt(StepDraft(0, 0), sequence)

    def check_invariants(self) -> None:
        """Raise `AssertionError` unless exactly the running sequences hold blocks and all ref-counts agree."""
        self.kv.check_invariants(sequence.seq_id for sequence in self._running)
        for sequence in self._running:
            held = len(self.kv.table(sequence.seq_id)) * self.kv.block_size
            if held < sequence.num_computed_tokens:
                raise AssertionError(f"sequence {sequence.seq_id} has KV for more tokens than its blocks hold")
