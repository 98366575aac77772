"""A step packed for its device: where everything is, and that rows which pad it change nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from steering import LONGEST_WAIT_S, arriving_together
from tiny_models import VOCAB, build_tiny

from core.execution.known_sequences import KnownSequences, PackedStep
from core.execution.records import SAMPLE, NewSequence, StepRecord, ints, longs
from core.execution.stage import DECODE_BUCKETS, Stage
from core.execution.step_buffers import InputBatch, PageDirectory, StepBuffers
from core.inference_pipeline import InferencePipeline
from core.request import SamplingParams

CPU = torch.device("cpu")


def packed(*sequences: tuple[int, int, list[int]]) -> PackedStep:
    """Sequences with `start` tokens behind them that compute `count` more, in these blocks."""
    new = tuple(
        NewSequence(i, ints(range(start + count)), start + count, ints(blocks), SamplingParams(), i)
        for i, (start, count, blocks) in enumerate(sequences)
    )
    starts, counts = [s for s, _, _ in sequences], [c for _, c, _ in sequences]
    flags = np.full(len(sequences), SAMPLE, dtype=np.uint8)
    ids = longs(range(len(sequences)))
    return KnownSequences().take(
        StepRecord(1, ids, ints(starts), ints(counts), ints([0] * len(sequences)), flags, new=new)
    )


def test_tokens_go_to_the_slots_of_their_blocks() -> None:
    step = packed((5, 1, [7, 3]), (2, 4, [1, 9]))
    batch = StepBuffers(CPU, 4).fill(step, step.tables)
    assert batch.input_ids.tolist() == [[5, 2, 3, 4, 5]]
    assert batch.position_ids.tolist() == [[5, 2, 3, 4, 5]]
    assert batch.attention.slot_mapping.tolist() == [3 * 4 + 1, 4 + 2, 4 + 3, 9 * 4, 9 * 4 + 1]
    assert batch.attention.query_start.tolist() == [0, 1, 5]
    assert batch.attention.seq_lens.tolist() == [6, 6]
    assert batch.attention.block_tables.tolist() == [[7, 3], [1, 9]]
    assert (batch.attention.num_decodes, batch.attention.max_query_len) == (1, 4)
    assert batch.logit_rows is not None and batch.logit_rows.tolist() == [0, 4]


def test_decodes_are_padded_to_a_bucket_at_the_same_addresses() -> None:
    buffers = StepBuffers(CPU, 4, buckets=(1, 2, 4), table_width=6, scratch_page=50)
    three = packed((5, 1, [7, 3]), (0, 1, [2]), (9, 1, [4, 5, 6]))
    first = buffers.fill(three, three.tables)
    assert first.num_tokens == 4
    assert first.attention.slot_mapping.tolist()[3] == 50 * 4
    assert first.attention.seq_lens.tolist() == [6, 1, 10, 1]
    assert first.attention.block_tables.shape == (4, 6)
    assert first.attention.block_tables[3, 0] == 50
    assert first.attention.host_query_start == (0, 1, 2, 3, 4)
    assert first.attention.num_decodes == 4
    assert first.logit_rows is not None and len(first.logit_rows) == 3, "nobody asks for what is padding"
    addresses = [t.data_ptr() for t in tensors(first)]
    four = packed((6, 1, [7, 3]), (1, 1, [2]), (10, 1, [4, 5, 6]), (3, 1, [8]))
    assert [t.data_ptr() for t in tensors(buffers.fill(four, four.tables))][:4] == addresses[:4]
    mixed = packed((5, 1, [7, 3]), (0, 3, [2]), (9, 1, [4, 5, 6]))
    assert buffers.fill(mixed, mixed.tables).num_tokens == 5, "a prompt is as long as it is"


def tensors(batch: InputBatch) -> list[torch.Tensor]:
    meta = batch.attention
    return [meta.query_start, meta.seq_lens, meta.slot_mapping, batch.input_ids, meta.block_tables]


def test_a_stage_finds_blocks_where_it_was_told_they_are() -> None:
    directory = PageDirectory()
    tables = ints([[3, 1], [2, 0]])
    assert directory.locate(tables)[1].tolist() == tables.tolist()
    directory.learn(ints([(3, 0, 8), (1, 2, 5), (2, 0, 4), (0, 0, 1)]))
    regions, pages = directory.locate(tables)
    assert (regions.tolist(), pages.tolist()) == ([[0, 2], [0, 0]], [[8, 5], [4, 1]])
    directory.learn(ints([(1, 0, 9)]))
    assert directory.locate(tables)[0].tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("devices", ["cpu=64MiB", "cpu=64MiB,cpu=64MiB"])
def test_padded_steps_give_the_same_tokens(
    tmp_path: Path, open_pipeline: Callable[..., InferencePipeline], monkeypatch: pytest.MonkeyPatch, devices: str
) -> None:
    """As on a GPU: few sizes, fixed tables, and a page that is nobody's."""
    build_tiny("gemma2", tmp_path)
    plain = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, detokenize=False, logprobs=1)
    requests = [([3 + (7 * i + j) % (VOCAB - 3) for j in range(3 + 5 * i)], plain) for i in range(5)]
    requests.append(([4, 5, 6], replace(plain, temperature=1.0, seed=3, n=2)))

    def answers() -> list[list[list[int]]]:
        pipeline = open_pipeline(
            tmp_path, devices__devices=devices, engine__block_size=4, engine__kv_cache_tokens=400, engine__cohorts=1
        )
        with arriving_together(pipeline):
            handles = [pipeline.submit(prompt, params) for prompt, params in requests]
        return [[list(c.token_ids) for c in handle.result(LONGEST_WAIT_S).completions] for handle in handles]

    expected = answers()
    sizes: set[int] = set()
    fill = StepBuffers.fill

    def noted(self: StepBuffers, step: PackedStep, pages: np.ndarray) -> InputBatch:
        batch = fill(self, step, pages)
        if step.num_decodes == step.num_sequences:
            sizes.add(batch.num_tokens)
        return batch

    monkeypatch.setattr(Stage, "pads_steps", True)
    monkeypatch.setattr(StepBuffers, "fill", noted)
    assert answers() == expected
    assert sizes <= set(DECODE_BUCKETS) and max(sizes) > 4
