"""A simulated replica keeps to the cost model, to its memory and to its own accounts."""

from __future__ import annotations

import math
import random

import pytest

from benchmarks.fleet_server import CHUNK, Call, Gaps, Server, Speeds
from benchmarks.fleet_world import BLOCK_TOKENS, Session, Turn, make_fleet, model_8b, problem_of
from core.costs.cost import best_cohorts, decode_tok_s
from core.placement.engine import stage_costs
from core.placement.replicas import Replica, ReplicaRates, partition


@pytest.fixture(scope="module")
def replica() -> Replica:
    fleet = make_fleet(10, random.Random(1))
    found = partition(fleet, ReplicaRates(problem_of(model_8b()), 0.15))
    return max(found.replicas, key=lambda each: len(each.nodes))


@pytest.fixture
def server(replica: Replica) -> Server:
    return Server("r", replica, Speeds(replica, (1,) * len(replica.plan.stages)), Gaps())


def session(number: int, *turns: tuple[int, int], shared: int = 256) -> Session:
    return Session(number, 0.0, 0, shared, tuple(Turn(message, answer, 1.0) for message, answer in turns))


def call(of: Session, turn: int = 0, arrival: int | None = None) -> Call:
    number = of.number if arrival is None else arrival
    return Call(of, turn, number, 0.0, of.prompt_tokens(turn), of.turns[turn].answer)


def run(server: Server, until_s: float = math.inf) -> list[tuple[float, Call]]:
    """Everything that ends, and when."""
    ended = []
    while server.wake_s < min(until_s, math.inf):
        now = server.wake_s
        ended += [(now, each) for each in server.advance(now)]
    return ended


def test_a_stream_alone_takes_what_the_cost_model_says(server: Server) -> None:
    problem, plan = server.replica.problem, server.replica.plan
    stages = stage_costs(plan, problem)
    alone = 1 / decode_tok_s(
        problem.costs, stages, problem.links, 1, 4096, best_cohorts(problem.costs, stages, problem.links, 1, 4096)
    )
    assert server.speeds.round_s(1, 4096) == pytest.approx(alone)
    one = call(session(1, (3840, 50)))
    server.submit(one, 0.0)
    ((end_s, ended),) = run(server)
    assert ended is one
    assert one.first_s == pytest.approx(4096 / server.speeds.prefill_tok_s + server.speeds.way_s)
    assert end_s - one.first_s == pytest.approx(49 * alone, rel=0.01)
    assert sum(server.gaps.counts.values()) == 49
    assert server.gaps.quantile(0.5) == pytest.approx(alone, rel=0.03)
    assert server.kv_used == 0 and server.computed_tokens == 0


def test_streams_share_rounds_and_a_prompt_makes_them_wait(server: Server) -> None:
    for number in range(4):
        server.submit(call(session(number, (100, 40))), 0.0)
    first = run(server)
    assert len(first) == 4
    assert sum(server.gaps.counts.values()) == 4 * 39
    longest = server.gaps.quantile(1.0)
    decode_s = server.speeds.round_s(4, 400)
    assert longest > decode_s * 1.2  # a chunk of another one's prompt was in it
    assert longest < 1.03 * (decode_s + CHUNK / server.speeds.prefill_tok_s + server.speeds.way_s)


def test_the_next_turn_finds_the_one_before(server: Server) -> None:
    talk = session(1, (1000, 100), (50, 100))
    server.submit(call(talk, 0, 0), 0.0)
    ((now, _),) = run(server)
    later = call(talk, 1, 1)
    server.submit(later, now)
    run(server)
    assert later.reused == (talk.prompt_tokens(0) + 100) // BLOCK_TOKENS * BLOCK_TOKENS
    other = call(session(2, (1000, 10)), 0, 2)
    server.submit(other, 1000.0)
    run(server)
    assert other.reused == 256  # the system prompt, nothing of another user's


def test_what_does_not_fit_waits(server: Server) -> None:
    calls = [call(session(number, (20000, 600))) for number in range(12)]
    for each in calls:
        server.submit(each, 0.0)
    while math.isfinite(server.wake_s):
        server.advance(server.wake_s)
        busy = len(server.running) + len(server.prompts)
        assert server.kv_used <= server.kv_tokens or busy == 1
        assert server.kv_used == sum(c.prompt + c.answer for c in [*server.running.values(), *server.prompts])
        server.cache.check_invariants()
    assert all(each.emitted == each.answer for each in calls)


def test_what_is_abandoned_has_the_tokens_that_were_there_and_goes_on_elsewhere(
    server: Server, replica: Replica
) -> None:
    one = call(session(1, (1000, 400)))
    server.submit(one, 0.0)
    run(server, until_s=0.0 + 1256 / server.speeds.prefill_tok_s + 0.5)
    now = server.wake_s - 1e-6
    assert server.computed_tokens > 1256
    (lost,) = server.abandon(now)
    assert lost is one and 0 < one.emitted < 400 and one.last_s == now
    assert server.computed_tokens == server.kv_used == 0 and server.wake_s == math.inf
    before = one.emitted
    other = Server("s", replica, server.speeds, Gaps())
    other.submit(one, now + 2.0)
    ((end_s, ended),) = run(other)
    assert ended.emitted == 400 and end_s > now + 2.0
    assert sum(other.gaps.counts.values()) == 400 - before  # the pause is one of them
    assert other.gaps.quantile(1.0) > 2.0
    assert other.prompt_tokens == one.prompt + before  # computed again, its own tokens too


def test_slow_machines_are_slow(replica: Replica) -> None:
    count = len(replica.plan.stages)
    usual, slowed = Speeds(replica, (1,) * count), Speeds(replica, (3,) + (1,) * (count - 1))
    assert slowed.round_s(1, 4096) > 1.3 * usual.round_s(1, 4096)
    assert slowed.prefill_tok_s < usual.prefill_tok_s
