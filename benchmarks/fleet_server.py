"""A replica as `benchmarks.fleet` simulates it: continuous batching over the cost model's times, with a prefix cache.

Between two moments at which something changes (a chunk of a prompt is computed, a stream ends, a request comes), all
rounds are alike and are taken together. In a round every stream gains a token; where a prompt is under way, a chunk of
it is computed in the same round, and the streams wait for both.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field, replace

from benchmarks.fleet_world import BLOCK_TOKENS, Session
from core.costs.cost import Batch, best_cohorts, decode_tok_s, pipeline_s
from core.placement.engine import stage_costs
from core.placement.replicas import Replica
from core.routing.affinity import ReplicaLoad
from core.routing.prefix_index import PrefixIndex

CHUNK = 512
_STREAMS = (1, 2, 4, 8, 16, 32, 64)
_CONTEXTS = (512, 4096, 16384)
_MOST_ROUNDS = 256


@dataclass(slots=True)
class Call:
    """A turn of a session on its way. Times are the simulation's; `emitted` tokens are with the client.

    `attempts` counts beginnings from nothing, `to_compute` tokens of the context that have no KV yet.
    """

    session: Session
    turn: int
    arrival: int
    submitted_s: float
    prompt: int
    answer: int
    emitted: int = 0
    first_s: float | None = None
    last_s: float = 0.0
    attempts: int = 1
    reused: int = 0
    to_compute: int = 0
    server: str = ""

    @property
    def context(self) -> int:
        """Tokens whose KV the next token needs."""
        return self.prompt + self.emitted

    def hashes(self) -> list[tuple[str, int, int]]:
        return self.session.hashes(self.context)


class Gaps:
    """Gaps between tokens, as counts in steps of 2 %."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}

    def add(self, seconds: float, count: int) -> None:
        step = math.ceil(math.log(max(seconds, 1e-4)) / math.log(1.02))
        self.counts[step] = self.counts.get(step, 0) + count

    def quantile(self, share: float) -> float:
        """Seconds that this share of the gaps does not exceed; nan without gaps."""
        wanted = share * sum(self.counts.values())
        seen = 0
        for step in sorted(self.counts):
            seen += self.counts[step]
            if seen >= wanted:
                return float(1.02**step)
        return math.nan


class Speeds:
    """How fast a replica is by the cost model, tabled. `slow`: a factor for each stage, 1 where it is as planned."""

    def __init__(self, replica: Replica, slow: tuple[int, ...]) -> None:
        problem = replica.problem
        stages = tuple(
            replace(
                stage,
                device=replace(
                    stage.device,
                    bandwidth_bytes_s=stage.device.bandwidth_bytes_s / factor,
                    flops=tuple((rows, rate / factor) for rows, rate in stage.device.flops),
                    layer_overhead_s=stage.device.layer_overhead_s * factor,
                ),
            )
            for stage, factor in zip(stage_costs(replica.plan, problem), slow, strict=True)
        )
        costs, links = problem.costs, problem.links
        self._rounds = []
        for context in _CONTEXTS:
            row = []
            for streams in _STREAMS:
                cohorts = best_cohorts(costs, stages, links, streams, context)
                row.append(streams / decode_tok_s(costs, stages, links, streams, context, cohorts))
            self._rounds.append(row)
        compute, hops = pipeline_s(costs, stages, links, Batch(CHUNK, CHUNK * 2048, 1))
        self.prefill_tok_s = CHUNK / max(compute + hops)
        self.way_s = sum(compute) + sum(hops) - max(compute + hops)
        """What a prompt's last chunk takes beyond the busiest stage."""

    def round_s(self, streams: int, context: float) -> float:
        """Seconds in which each of `streams` streams of `context` tokens gains a token."""
        return _between(_CONTEXTS, [_between(_STREAMS, row, streams) for row in self._rounds], context)


def _between(points: tuple[int, ...], values: list[float], at: float) -> float:
    """Linear between two points; beyond the last one, on along its line; below the first one, its value."""
    if at <= points[0]:
        return values[0]
    index = min(bisect_left(points, at), len(points) - 1)
    low, high = points[index - 1], points[index]
    return values[index - 1] + (values[index] - values[index - 1]) * (at - low) / (high - low)


@dataclass(slots=True)
class Server:
    """One replica at work. `wake_s` is when it has to be looked at next; infinite while it has nothing to do."""

    name: str
    replica: Replica
    speeds: Speeds
    gaps: Gaps
    ready_s: float = 0.0
    wake_s: float = math.inf
    cache: PrefixIndex = field(default_factory=PrefixIndex)
    waiting: deque[Call] = field(default_factory=deque)
    prompts: deque[Call] = field(default_factory=deque)
    running: dict[int, Call] = field(default_factory=dict)
    kv_used: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    _ends: list[tuple[int, int]] = field(default_factory=list)
    _round: int = 0
    _context: int = 0
    _from_s: float = 0.0
    _step_s: float = 0.0
    _rounds: int = 0
    _chunk: int = 0
    _begun: dict[int, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._make_room()

    @property
    def kv_tokens(self) -> int:
        return self.replica.plan.kv_tokens

    @property
    def computed_tokens(self) -> int:
        """Whose KV requests use that are under way."""
        return self._context + sum(call.context - call.to_compute for call in self.prompts)

    def load(self) -> ReplicaLoad:
        """As a router is told of it."""
        streams = len(self.running) + len(self.prompts) + len(self.waiting)
        left = sum(call.to_compute for call in self.prompts) + sum(call.context for call in self.waiting)
        mean = self._context / len(self.running) if self.running else 1024
        most = max(1, min(self.replica.problem.streams, self.kv_tokens // 1500))
        token_s = self.speeds.round_s(min(len(self.running) + 1, most), mean)
        return ReplicaLoad(self.name, left, self.speeds.prefill_tok_s, streams, most, token_s)

    def submit(self, call: Call, now: float, *, first: bool = False) -> None:
        """A request comes; `first`: before those that wait."""
        call.server = self.name
        if first:
            self.waiting.appendleft(call)
        else:
            self.waiting.append(call)
        if self._rounds == 0:
            self.wake_s = max(now, self.ready_s)
        elif self._chunk == 0:  # it joins at the end of the round that is under way
            done = max(1, math.ceil((now - self._from_s) / self._step_s))
            self._rounds = min(self._rounds, done)
            self.wake_s = self._from_s + self._rounds * self._step_s

    def advance(self, now: float) -> list[Call]:
        """What ends at `wake_s`; the calls whose last token has come."""
        ended = self._finish_rounds(now) if self._rounds else []
        self._admit()
        self._begin_rounds(now)
        return ended

    def abandon(self, now: float) -> list[Call]:
        """Everything that is here, told how far it has come; it has nothing any more."""
        if self._rounds:
            whole = int((now - self._from_s) / self._step_s) if self._chunk == 0 else 0
            self._count_rounds(min(whole, self._rounds))
        calls = [*self.running.values(), *self.prompts, *self.waiting]
        for number, call in self.running.items():
            call.emitted, call.last_s = self._emitted(number), now
        self.running.clear()
        self.prompts.clear()
        self.waiting.clear()
        self._ends.clear()
        self._begun.clear()
        self.kv_used = self._context = self._rounds = self._chunk = 0
        self.wake_s = math.inf
        self.cache = PrefixIndex()
        self._make_room()
        return calls

    def _emitted(self, number: int) -> int:
        since, before = self._begun[number]
        return before + self._round - since

    def _admit(self) -> None:
        """Waiting calls whose KV has room begin; room is kept for their whole answer."""
        while self.waiting:
            call = self.waiting[0]
            needed = call.prompt + call.answer
            busy = len(self.running) + len(self.prompts)
            if busy >= self.replica.problem.streams or (busy and self.kv_used + needed > self.kv_tokens):
                return
            self.waiting.popleft()
            self.kv_used += needed
            self._make_room()
            held = self.cache.matches(call.hashes()).get(self.name, 0) * BLOCK_TOKENS
            reused = min(held, call.context - 1)
            call.reused += reused
            call.to_compute = call.context - reused
            self.prompt_tokens += call.context
            self.reused_tokens += reused
            self.prompts.append(call)

    def _make_room(self) -> None:
        self.cache.set_capacity(self.name, (self.kv_tokens - self.kv_used) // BLOCK_TOKENS)

    def _begin_rounds(self, now: float) -> None:
        self._from_s, self._chunk, self._rounds = now, 0, 0
        streams = len(self.running)
        mean = self._context / streams if streams else 0.0
        decode_s = self.speeds.round_s(streams, mean) if streams else 0.0
        if self.prompts:
            call = self.prompts[0]
            self._chunk = min(CHUNK, call.to_compute)
            last_s = self.speeds.way_s if self._chunk == call.to_compute else 0.0
            self._step_s = decode_s + self._chunk / self.speeds.prefill_tok_s + last_s
            self._rounds = 1
        elif streams:
            self._step_s = decode_s
            self._rounds = min(self._ends[0][0] - self._round, _MOST_ROUNDS)
        self.wake_s = now + self._rounds * self._step_s if self._rounds else math.inf

    def _count_rounds(self, rounds: int) -> None:
        if rounds and self.running:
            self._round += rounds
            self._context += rounds * len(self.running)
            self.gaps.add(self._step_s, rounds * len(self.running))

    def _finish_rounds(self, now: float) -> list[Call]:
        self._count_rounds(self._rounds)
        if self._chunk:
            call = self.prompts[0]
            call.to_compute -= self._chunk
            if call.to_compute == 0:
                self.prompts.popleft()
                self._start(call, now)
        ended = []
        while self._ends and self._ends[0][0] <= self._round:
            _, number = heapq.heappop(self._ends)
            call = self.running.pop(number)
            call.emitted = call.answer
            self._begun.pop(number)
            self._context -= call.prompt + call.answer
            call.last_s = now
            self.kv_used -= call.prompt + call.answer
            self._make_room()
            self.cache.record(self.name, call.hashes())
            ended.append(call)
        return ended

    def _start(self, call: Call, now: float) -> None:
        """Its prompt is computed, which gives one token."""
        if call.first_s is None:
            call.first_s = now
        elif call.last_s:
            self.gaps.add(now - call.last_s, 1)
        call.last_s = 0.0
        call.emitted = min(call.emitted + 1, call.answer)
        self.running[call.arrival] = call
        self._begun[call.arrival] = (self._round, call.emitted)
        self._context += call.context
        self.cache.record(self.name, call.session.hashes(call.prompt))
        heapq.heappush(self._ends, (self._round + call.answer - call.emitted, call.arrival))
