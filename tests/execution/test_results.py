"""What the last stage makes of its logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from core.execution.known_sequences import KnownSequences
from core.execution.records import SAMPLE, NewSequence, RawRows, StepRecord, ints, longs
from core.execution.results import ResultMaker
from core.request import SamplingParams

VOCAB = 32


def record(count: int, flags: list[int], raw: RawRows | None = None) -> StepRecord:
    new = tuple(NewSequence(i, ints([1, 2]), 2, ints([i]), SamplingParams(temperature=0.0), i) for i in range(count))
    return StepRecord(
        1, longs(range(count)), ints([0] * count), ints([2] * count), ints([0] * count),
        np.array(flags, dtype=np.uint8), new=new, raw=raw,
    )  # fmt: skip


def test_logits_that_are_all_sampled_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    maker, seen = ResultMaker(VOCAB, torch.device("cpu")), []
    sample = maker.sampler.sample
    monkeypatch.setattr(
        maker.sampler, "sample", lambda logits, rows: (seen.append(logits.data_ptr()), sample(logits, rows))[1]
    )
    step = KnownSequences().take(record(3, [SAMPLE] * 3))
    logits = torch.randn(3, VOCAB)
    result = maker.make(step, logits)
    assert seen == [logits.data_ptr()]
    assert [result.sampled[i].token_id for i in range(3)] == logits.argmax(1).tolist()


def test_rows_that_are_no_numbers_fail_alone() -> None:
    step = KnownSequences().take(record(3, [SAMPLE] * 3))
    logits = torch.randn(3, VOCAB)
    logits[1] = float("nan")
    result = ResultMaker(VOCAB, torch.device("cpu")).make(step, logits)
    assert sorted(result.sampled) == [0, 2] and "NaN" in result.failed[1]


def test_raw_rows_come_as_they_are() -> None:
    step = KnownSequences().take(record(1, [0], RawRows("hidden_states", ints([1]))))
    hidden = torch.randn(2, 8)
    raw = ResultMaker(VOCAB, torch.device("cpu")).make(step, hidden).raw
    assert raw is not None and np.array_equal(raw, hidden[1:].numpy())
