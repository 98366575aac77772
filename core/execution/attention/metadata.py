"""Where the tokens of a packed batch belong. The same for every layer of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

Bounds = tuple[torch.Tensor, torch.Tensor]


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
        max_query_len: tokens of the longest sequence in this step.
        sites: where pages are, if not all on the stage's own device: the own device's part first. `block_tables` then
            mean nothing.
    """

    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    num_decodes: int
    host_query_start: tuple[int, ...]
    host_seq_lens: tuple[int, ...]
    max_query_len: int
    sites: tuple[Site, ...] = ()


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """How one layer attends: `scale` multiplies the scores; `window` is the number of visible positions (None: all);
    `softcap` bounds scores as `cap * tanh(score / cap)`; `sinks` `[num_heads]` join the softmax without a value.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class SiteBatch:
    """What one place (a site) holds of the KV of a packed batch of S sequences and R query rows.

    A sequence's blocks may lie at several sites, in any distribution. Its keys at this one are numbered from 0 in
    ascending order of position, without the gaps. Every page is full but possibly a sequence's last.

    Attributes:
        block_tables: int32 `[S, M]`, page ids at the site, in ascending order of position, unused entries 0.
        query_start: int32 `[S + 1]`, first row of each sequence among the query rows.
        seq_lens: int32 `[S]`, keys of each sequence at this site; 0 where it has none.
        host_query_start, host_seq_lens: the same numbers without a device round trip.
        max_query_len: rows of the sequence that has most of them.
        block_index: int32 `[S, M]`, on the host: key j of entry m is at position `block_index[s, m] * block_size + j`.
        query_at: int32 `[R]`, on the host: the position of each query row, ascending within a sequence.
        block_size: keys per page.
    """

    block_tables: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    host_query_start: tuple[int, ...]
    host_seq_lens: tuple[int, ...]
    max_query_len: int
    block_index: np.ndarray
    query_at: np.ndarray
    block_size: int
    _bounds: dict[int | None, Bounds] = field(default_factory=dict, repr=False, compare=False)

    def bounds(self, window: int | None) -> Bounds:
        """`(lo, hi)`, int32 `[R]` on the site's device: row r sees the keys numbered `lo[r] <= j < hi[r]`.

        Those are the keys at positions up to the row's own, and no further back than `window` positions (None: all).
        Worked out once per window, because every layer asks.
        """
        found = self._bounds.get(window)
        if found is None:
            hi = self._keys_up_to(self.query_at)
            lo = np.zeros_like(hi) if window is None else self._keys_up_to(self.query_at - window)
            lo_at_device, hi_at_device = _move(self.block_tables.device, lo, hi)
            found = self._bounds[window] = (lo_at_device, hi_at_device)
        return found

    def _keys_up_to(self, positions: np.ndarray) -> np.ndarray:
        """int32 `[R]`: how many keys of the row's sequence lie at or before `positions` `[R]` (which may be negative).

        One binary search answers all rows: blocks of sequence s are numbered from `s * stride`, so that the tables, one
        after the other, ascend.
        """
        lengths = np.asarray(self.host_seq_lens, dtype=np.int64)
        entries = -(-lengths // self.block_size)
        first_entry = np.cumsum(entries) - entries
        sequence = np.repeat(np.arange(len(lengths)), np.diff(self.host_query_start))
        block, offset = np.divmod(positions.astype(np.int64), self.block_size)
        used = np.arange(self.block_index.shape[1]) < entries[:, None]
        stride = max(self.block_index.max(initial=0), block.max(initial=0)) + 1
        held = (self.block_index + np.arange(len(lengths))[:, None] * stride)[used]
        wanted = sequence * stride + np.maximum(block, 0)
        at = np.searchsorted(held, wanted)
        within = np.append(held, -1)[at] == wanted  # the position's own block is here
        count = (at - first_entry[sequence]) * self.block_size + within * (offset + 1)
        return np.where(block < 0, 0, np.minimum(count, lengths[sequence])).astype(np.int32)


def build_site_batch(
    tables: Sequence[np.ndarray], block_indices: Sequence[np.ndarray], key_counts: Sequence[int],
    query_lens: Sequence[int], query_at: np.ndarray, block_size: int, device: torch.device,
) -> SiteBatch:  # fmt: skip
    """The record of one site from host data.

    Args:
        tables: of each of S sequences, the ids of its pages at the site, in ascending order of position; may be empty.
        block_indices: beside them, which block of the sequence each page holds.
        key_counts: keys of each sequence at the site: all its pages are full but possibly the last.
        query_lens: query rows of each sequence.
        query_at: positions of all the query rows, `[R]`, sequence after sequence.
        block_size: keys per page.
        device: where the site's pages are.
    """
    count, width = len(tables), max((len(table) for table in tables), default=0)
    block_index = np.zeros((count, width), dtype=np.int32)
    host_tables, starts = np.zeros((count, width), dtype=np.int32), np.zeros(count + 1, dtype=np.int32)
    starts[1:] = np.cumsum(query_lens)
    for row, (table, index) in enumerate(zip(tables, block_indices, strict=True)):
        host_tables[row, : len(table)] = table
        block_index[row, : len(index)] = index
    lengths = np.array(key_counts, dtype=np.int32)
    block_tables, query_start, seq_lens = _move(device, host_tables, starts, lengths)
    return SiteBatch(
        block_tables=block_tables,
        query_start=query_start,
        seq_lens=seq_lens,
        host_query_start=tuple(starts.tolist()),
        host_seq_lens=tuple(lengths.tolist()),
        max_query_len=max(query_lens, default=0),
        block_index=block_index,
        query_at=np.asarray(query_at, dtype=np.int32),
        block_size=block_size,
    )


def _move(device: torch.device, *arrays: np.ndarray) -> list[torch.Tensor]:
    """int32 arrays on `device`, in one transfer. Each begins at a multiple of 16 bytes: kernels are compiled anew for
    addresses that are aligned otherwise.
    """
    firsts = np.cumsum([0, *(-(-array.size // 4) * 4 for array in arrays)]).tolist()
    packed = np.zeros(firsts[-1], dtype=np.int32)
    for first, array in zip(firsts, arrays, strict=False):
        packed[first : first + array.size] = array.ravel()
    moved = torch.from_numpy(packed).to(device, non_blocking=True)
    return [moved[first : first + array.size].view(array.shape) for first, array in zip(firsts, arrays, strict=False)]


@dataclass(frozen=True, slots=True)
class Site:
    """One device's part of a step's attention.

    Attributes:
        device_name: logical device; "" for the stage's own.
        rows: int64 `[R]` on the stage's own device, the rows of the packed batch that attend here.
        regions: of pages on that device, each with what it holds; the batch's rows are `rows`.
    """

    device_name: str
    rows: torch.Tensor
    regions: tuple[tuple[int, SiteBatch], ...]
