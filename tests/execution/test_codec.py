"""Records as bytes: what comes out is what went in, and what does not fit together does not come out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.batching.sequence import Request, Sequence
from core.batching.step import record_of
from core.errors import RecordError
from core.execution.codec import VERSION, decode, encode
from core.execution.known_sequences import KnownSequences
from core.execution.records import NewSequence, RawRows, SampledToken, StepOutput, StepRecord, ints, longs
from core.kv_cache.manager import KVCacheManager
from core.kv_cache.page_ops import PageCopy, PageLoad, PageSave, StagePart
from core.request import SamplingParams, TokenLogprob


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, (StepRecord, StagePart, StepOutput, NewSequence, RawRows)):
        return type(a) is type(b) and all(same(getattr(a, f), getattr(b, f)) for f in a.__struct_fields__)
    if isinstance(a, tuple) and a and isinstance(a[0], NewSequence):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


PARAMS = SamplingParams(temperature=0.5, seed=2**62, logit_bias={3: -1.5}, stop=("end",), logprobs=4, n=2)
RECORD = StepRecord(
    7, longs([5, 2**40]), ints([3, 0]), ints([1, 4]), ints([1, 0]), np.array([1, 3], dtype=np.uint8), ints([9]),
    ints([(0, 1, 12)]), (NewSequence(2**40, ints([1, 2, 3, 4]), 4, ints([6]), PARAMS, 2**63 - 1, (0, 2), b"mine"),),
    longs([5]), RawRows("logits", ints([4])),
)  # fmt: skip
PART = StagePart(
    (PageCopy((0, 1), (2, 3)), PageSave((1, 0), b"\x01" * 16, 3), PageLoad(b"\xff" * 16, (0, 7), 4)), ints([(4, 0, 1)])
)
OUTPUT = StepOutput(
    7, {5: SampledToken(11, TokenLogprob(11, -0.25, ((11, -0.25), (3, -2.0)))), 2**40: SampledToken(0)}, {6: "NaN"},
    {5: [TokenLogprob(2, -1.0)]}, np.ones((2, 3), dtype=np.float32),
)  # fmt: skip


@pytest.mark.parametrize("record", [RECORD, PART, OUTPUT, StepRecord(1), StagePart(), StepOutput(1)])
def test_records_come_back_as_they_were(record: StepRecord | StagePart | StepOutput) -> None:
    assert same(decode(encode(record), type(record)), record)


def test_another_version_is_refused() -> None:
    with pytest.raises(RecordError, match="version"):
        decode(bytes((VERSION + 1,)) + encode(RECORD)[1:], StepRecord)
    with pytest.raises(RecordError, match="version None"):
        decode(b"", StepRecord)


def changed(**fields: Any) -> bytes:
    return encode(msgspec.structs.replace(RECORD, **fields))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (changed(starts=ints([3])), "starts"),
        (changed(counts=longs([1, 4])), "counts"),
        (changed(told=ints([2, 0])), "tokens"),
        (changed(told=ints([2, -1])), "negative"),
        (changed(blocks=ints([(2, 0, 1)])), "not there"),
        (changed(blocks=ints([(0, 0, -1)])), "blocks"),
        (changed(new=(NewSequence(1, ints([1]), 2, ints(), PARAMS, 0),)), "prompt"),
        (changed(flags=np.zeros(1, dtype=np.uint8)), "flags"),
        (encode(PART), "cannot be read"),
        (encode(msgspec.structs.replace(PART, placed=ints([1, 2]))), "cannot be read"),
        (encode(RECORD)[:-3], "cannot be read"),
    ],
)
def test_what_does_not_fit_together_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(RecordError, match=said):
        decode(data, StepRecord)


@given(st.binary(max_size=200), st.integers(0, 400))
def test_damage_is_an_error_of_its_own_or_none(noise: bytes, at: int) -> None:
    good = encode(RECORD)
    for data in (bytes((VERSION,)) + noise, good[:at] + noise + good[at + len(noise) :]):
        for kind in (StepRecord, StagePart, StepOutput):
            try:
                decode(data, kind)
            except RecordError:
                continue


@pytest.mark.parametrize("context", [100, 100_000])
def test_a_decode_step_of_64_sequences_is_small_at_any_context(context: int) -> None:
    kv = KVCacheManager(64 * (context // 16 + 8), 16, enable_prefix_caching=False)
    chosen = []
    for index in range(64):
        request = Request(f"r{index}", [7] * context, replace(PARAMS, n=1), 1000)
        sequence = Sequence(request, 0, 0, list(request.prompt_token_ids), seq_id=2**33 + index)
        kv.open(sequence.seq_id, sequence.token_ids, read_prefix=False)
        assert kv.grow(sequence.seq_id, 0, context)
        chosen.append((sequence, context))
    known = KnownSequences()
    known.take(decode(encode(record_of(1, chosen, [], kv)), StepRecord))
    sizes = []
    for step in range(2, 40):
        for sequence, _ in chosen:
            sequence.rewind(len(sequence.token_ids))
            sequence.append(151_000 + step)
            assert kv.grow(sequence.seq_id, len(sequence.token_ids) - 1, len(sequence.token_ids))
        data = encode(record_of(step, [(sequence, 1) for sequence, _ in chosen], [], kv))
        sizes.append(len(data))
        packed = known.take(decode(data, StepRecord))
        assert packed.token_ids.tolist() == [151_000 + step] * 64
        for row, (sequence, _) in enumerate(chosen):
            blocks = kv.table(sequence.seq_id).blocks
            assert packed.tables[row, : len(blocks)].tolist() == blocks.tolist()
    assert max(sizes) <= 4096, "also when all 64 begin a block"


def test_what_does_not_follow_on_what_was_told_is_refused() -> None:
    with pytest.raises(RecordError, match="has not been told"):
        KnownSequences().take(StepRecord(1, longs([1]), ints([0]), ints([1]), ints([0]), np.zeros(1, dtype=np.uint8)))
    known = KnownSequences()
    new = NewSequence(1, ints([1, 2]), 2, ints([0]), SamplingParams(), 0)
    with pytest.raises(RecordError, match="tokens that have not been told"):
        known.take(StepRecord(1, longs([1]), ints([0]), ints([3]), ints([0]), np.zeros(1, dtype=np.uint8), new=(new,)))
