"""From a `SchedulerOutput` to the tensors of one packed forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from core.execution.attention.metadata import AttentionMetadata
from core.execution.schedule import ScheduledSequence, SchedulerOutput


@dataclass(frozen=True, slots=True)
class InputBatch:
    """A step on one device. `input_ids` and `position_ids` are int64 `[1, T]`."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention: AttentionMetadata

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def num_kv_tokens(self) -> int:
        """KV tokens that attention reads on the stage's own device, over all sequences."""
        if self.attention.sites:
            return sum(self.attention.sites[0].regions[0][1].host_seq_lens)
        return sum(self.attention.host_seq_lens)

    def to(self, device: torch.device) -> InputBatch:
        """The same batch on another device; itself if it is there."""
        if self.input_ids.device == device:
            return self
        meta = self.attention
        moved = replace(
            meta,
            slot_mapping=meta.slot_mapping.to(device, non_blocking=True),
            block_tables=meta.block_tables.to(device, non_blocking=True),
            query_start=meta.query_start.to(device, non_blocking=True),
            seq_lens=meta.seq_lens.to(device, non_blocking=True),
        )
        input_ids = self.input_ids.to(device, non_blocking=True)
        return InputBatch(input_ids, self.position_ids.to(device, non_blocking=True), moved)


def build_batch(output: SchedulerOutput, block_size: int) -> InputBatch:
    """Pack the step's tokens, on the CPU. Positions count from each sequence's start."""
    sequences = output.sequences
    lengths = [item.num_tokens for item in sequences]
    query_start = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    tokens = np.concatenate([np.asarray(item.token_ids, dtype=np.int64) for item in sequences])
    positions = np.concatenate([np.arange(item.start, item.end, dtype=np.int64) for item in sequences])
    seq_lens = np.array([item.end for item in sequences], dtype=np.int32)
    metadata = AttentionMetadata(
        slot_mapping=torch.from_numpy(np.concatenate([_slots(item, block_size) for item in sequences])),
        block_tables=torch.from_numpy(pad_tables([item.block_table for item in sequences])),
        query_start=torch.from_numpy(query_start),
        seq_lens=torch.from_numpy(seq_lens),
        num_decodes=sum(1 for length in lengths if length == 1),
        host_query_start=tuple(query_start.tolist()),
        host_seq_lens=tuple(seq_lens.tolist()),
        max_query_len=max(lengths),
    )
    return InputBatch(torch.from_numpy(tokens)[None], torch.from_numpy(positions)[None], metadata)


def _slots(item: ScheduledSequence, block_size: int) -> np.ndarray:
    """int64 slots of a sequence's new tokens."""
    positions = np.arange(item.start, item.end, dtype=np.int64)
    return item.block_table[positions // block_size].astype(np.int64) * block_size + positions % block_size


def pad_tables(tables: Sequence[np.ndarray]) -> np.ndarray:
    """int32 `[S, max_blocks]`, padded with 0."""
    padded = np.zeros((len(tables), max(len(table) for table in tables)), dtype=np.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    return padded
