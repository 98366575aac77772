"""Masks on logits: rows that have one choose within it, and the others choose as ever."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from core.execution.sampler import NonFiniteLogitsError, Sampler, SamplingRow
from core.request import SamplingParams

VOCAB = 100
PARAMS = (
    SamplingParams(temperature=0.0), SamplingParams(temperature=0.0, logprobs=3), SamplingParams(temperature=1.3),
    SamplingParams(temperature=0.9, top_k=5, top_p=0.9, min_p=0.01, logit_bias={3: 90.0}),
    SamplingParams(temperature=1.0, frequency_penalty=1.5, logprobs=0),
)  # fmt: skip


def mask_of(*tokens: int) -> np.ndarray:
    bits = np.zeros(-(-VOCAB // 8) * 8, dtype=np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_choose_within_their_masks_and_neighbours_as_without(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    logits = torch.randn(10, VOCAB + 4).to(dtype)
    before, allowed = logits.clone(), (7, 8, 64, 99)
    rows = [SamplingRow(index, PARAMS[index // 2], 5, 9, (1, 2), (7, 8)) for index in range(10)]
    masked = [
        SamplingRow(row.seq_id, row.params, 5, 9, (1, 2), (7, 8), mask=mask_of(*allowed) if row.seq_id % 2 else None)
        for row in rows
    ]
    free, kept = (Sampler(VOCAB, torch.device("cpu")).sample(logits, each) for each in (rows, masked))
    assert torch.equal(logits, before)
    assert [each.token_id for each in kept[1::2]] != [each.token_id for each in free[1::2]]
    assert all(each.token_id in allowed for each in kept[1::2])
    assert kept[0::2] == free[0::2]
    greedy = max(allowed, key=lambda token: float(logits[1, token]))
    assert kept[1].token_id == greedy
    probability = float(torch.log_softmax(logits[3, :VOCAB].float(), 0)[kept[3].token_id])
    assert kept[3].logprob is not None and kept[3].logprob.logprob == pytest.approx(probability, abs=1e-5)
    assert free[3].logprob is not None and kept[3].logprob.top == free[3].logprob.top, "as the model has it"


def test_a_mask_that_leaves_nothing_fails_its_row_alone() -> None:
    logits = torch.randn(3, VOCAB)
    masks = (None, mask_of(), mask_of(4))
    rows = [SamplingRow(index, PARAMS[0], 5, 9, mask=mask) for index, mask in enumerate(masks)]
    with pytest.raises(NonFiniteLogitsError) as failed:
        Sampler(VOCAB, torch.device("cpu")).sample(logits, rows)
    assert failed.value.seq_ids == (1,)
