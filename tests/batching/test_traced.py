"""What is noted of requests whose trace is recorded: steps that they were part of, by phase and stage."""

from __future__ import annotations

from typing import Any

from test_decisions import make_request

from core.batching.running import RunningSequences
from core.batching.sequence import Request, SequenceStatus
from core.batching.traced import Traced
from core.execution.records import StepRecord, longs
from core.request import StageWork, TraceContext

TRACE = TraceContext("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")


def running(*requests: Request) -> RunningSequences:
    found = RunningSequences()
    for request in requests:
        for sequence in request.sequences:
            sequence.status = SequenceStatus.RUNNING
            found.append(sequence)
    return found


def step(*sequences: Any) -> StepRecord:
    return StepRecord(step=1, seq_ids=longs([sequence.seq_id for sequence in sequences]))


def test_a_step_counts_once_for_each_request_in_it() -> None:
    traced, other, absent = make_request("a", 4, n=3), make_request("b", 4), make_request("c", 4)
    traced.traced, absent.traced = Traced(TRACE), Traced(TRACE)
    found = running(traced, other, absent)
    found.credit(step(*traced.sequences, *other.sequences), {"0:a": 1.0, "1:b": 0.25})
    assert traced.traced.work() == (StageWork("prefill", "0:a", 1, 1.0), StageWork("prefill", "1:b", 1, 0.25))
    assert absent.traced.work() == () and other.traced is None


def test_from_its_first_token_on_it_decodes() -> None:
    request = make_request("a", 4, n=2)
    request.traced = Traced(TRACE)
    found = running(request)
    first, second = request.sequences
    found.credit(step(first), {"0:a": 1.0})
    found.credit(step(first), {"0:a": 2.0})
    first.append(5)
    found.credit(step(second), {"0:a": 4.0})
    assert request.traced.work() == (StageWork("prefill", "0:a", 2, 3.0), StageWork("decode", "0:a", 1, 4.0))
