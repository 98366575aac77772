"""Random paged batches for attention backends, and the answer computed densely in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from core.execution.attention.metadata import AttentionMetadata, AttentionSpec


@dataclass(frozen=True)
class Case:
    """Sequences as `(query rows, total length)`."""

    sequences: tuple[tuple[int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    key_dim: int = 16
    value_dim: int = 16
    block_size: int = 4
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    dtype: torch.dtype = torch.float32


CASES = {
    "decode": Case(((1, 1), (1, 7), (1, 70), (1, 133))),
    "prefill": Case(((5, 5), (40, 40))),
    "mixed": Case(((1, 9), (1, 64), (3, 20), (33, 90))),
    "one_head_per_kv": Case(((1, 9), (6, 20)), heads=4, kv_heads=4),
    "seven_heads_per_kv": Case(((1, 9), (6, 20)), heads=7, kv_heads=1),
    "window": Case(((1, 30), (1, 3), (20, 50)), window=6),
    "softcap": Case(((1, 30), (9, 30)), softcap=2.0),
    "sinks": Case(((1, 30), (9, 30)), sinks=True),
    "everything": Case(((1, 30), (9, 80)), window=13, softcap=3.0, sinks=True),
    "other_value_dim": Case(((1, 30), (9, 30)), key_dim=24, value_dim=16),
    "odd_dim": Case(((1, 30), (9, 30)), key_dim=20, value_dim=20),
    "large_pages": Case(((1, 30), (9, 70)), block_size=32),
    "bfloat16": Case(((1, 30), (9, 70)), dtype=torch.bfloat16),
    "float16": Case(((1, 30), (9, 70)), dtype=torch.float16),
}


def make(
    case: Case, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionMetadata, AttentionSpec]:
    """Query `[T, heads, key_dim]`, K and V pages (garbage where no sequence writes), metadata, spec."""
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-length // case.block_size) for _, length in case.sequences]
    num_blocks = sum(needed) + 3
    order = torch.randperm(num_blocks, generator=generator).to(torch.int32)
    tables = torch.zeros(len(needed), max(needed) + 1, dtype=torch.int32)
    taken = 0
    for row, count in enumerate(needed):
        tables[row, :count] = order[taken : taken + count]
        taken += count
    rows = [rows for rows, _ in case.sequences]
    starts = [0]
    for count in rows:
        starts.append(starts[-1] + count)
    lengths = [length for _, length in case.sequences]

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(case.dtype)

    query = normal(starts[-1], case.heads, case.key_dim)
    k_pages = normal(num_blocks, case.block_size, case.kv_heads, case.key_dim)
    v_pages = normal(num_blocks, case.block_size, case.kv_heads, case.value_dim)
    metadata = AttentionMetadata(
        slot_mapping=torch.zeros(starts[-1], dtype=torch.int64),
        block_tables=tables,
        query_start=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        num_decodes=sum(1 for count in rows if count == 1),
        host_query_start=tuple(starts),
        host_seq_lens=tuple(lengths),
        max_query_len=max(rows),
    )
    sinks = torch.randn(case.heads, generator=generator) if case.sinks else None
    return query, k_pages, v_pages, metadata, AttentionSpec(case.key_dim**-0.5, case.window, case.softcap, sinks)


def dense(
    query: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, metadata: AttentionMetadata, spec: AttentionSpec
) -> torch.Tensor:
    """The definition, row by row, in float64."""
    group = query.shape[1] // k_pages.shape[2]
    out = torch.zeros(query.shape[0], query.shape[1], v_pages.shape[-1], dtype=torch.float64)
    for index, length in enumerate(metadata.host_seq_lens):
        first, last = metadata.host_query_start[index : index + 2]
        pages = metadata.block_tables[index, : -(-length // k_pages.shape[1])].long()
        key, value = (p[pages].flatten(0, 1)[:length].double() for p in (k_pages, v_pages))
        for row in range(first, last):
            position = length - (last - row)
            low = 0 if spec.window is None else max(0, position - spec.window + 1)
            for head in range(query.shape[1]):
                scores = key[low : position + 1, head // group] @ query[row, head].double() * spec.scale
                if spec.softcap is not None:
                    scores = spec.softcap * torch.tanh(scores / spec.softcap)
                if spec.sinks is not None:
                    scores = torch.cat([scores, spec.sinks[head].double()[None]])
                weights = scores.softmax(0)[: position + 1 - low]
                out[row, head] = weights @ value[low : position + 1, head // group]
    return out


def tolerance(case: Case) -> float:
    return {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[case.dtype]
