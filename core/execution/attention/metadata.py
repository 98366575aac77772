"""Where the tokens of a packed batch belong. The same for every layer of a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """A packed batch of S sequences and T tokens, those with a single token first.

    Attributes:
        slot_mapping: int64 `[T]`, the KV slot of each token.
        block_tables: int32 `[S, max_blocks]`, unused entries 0.
        query_start: int32 `[S + 1]`, first row of each sequence in the packed batch.
        seq_lens: int32 `[S]`, tokens with KV once this step's are written.
        num_decodes: leading sequences with one token in this step.
        host_query_start, host_seq_lens: the same numbers as `query_start` and `seq_lens`, without a device round trip.
    """

    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    num_decodes: int
    host_query_start: tuple[int, ...]
    host_seq_lens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """How one layer attends: `scale` multiplies the scores; `window` is the number of visible positions (None: all);
    `softcap` bounds scores as `cap * tanh(score / cap)`; `sinks` `[num_heads]` join the softmax without a value.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
