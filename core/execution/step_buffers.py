"""A step on one stage's device: packed into one buffer, sent there by one copy.

::

    | query_start | seq_lens | slot_mapping | token_ids | positions | logit_rows | block_tables |

A GPU's stage has one such buffer on its device, so a step of the same size finds its inputs at the same addresses;
where sizes come in `buckets`, steps that decode are padded to the next one. Rows that pad a step write to a scratch
page and are nobody's. The host's side is pinned, and there are two, since the copy of one may still be under way. A
stage on the CPU uses the arrays as they are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from core.execution.attention.metadata import AttentionMetadata
from core.execution.known_sequences import PackedStep
from core.execution.records import Ints

_ALIGN = 16


@dataclass(frozen=True, slots=True)
class InputBatch:
    """A step on one device. `input_ids` and `position_ids` are int64 `[1, T]`; `logit_rows` int64 `[R]`, None where no
    logits are wanted. `rope_lengths` int64 `[T]` for models whose rotary embeddings depend on lengths.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    logit_rows: torch.Tensor | None
    attention: AttentionMetadata
    rope_lengths: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def num_kv_tokens(self) -> int:
        """KV tokens that attention reads on the stage's own device, over all sequences."""
        if self.attention.sites:
            return sum(self.attention.sites[0].regions[0][1].host_seq_lens)
        return sum(self.attention.host_seq_lens)


_Section: TypeAlias = tuple[slice, torch.dtype, tuple[int, ...]]
"""Where an array is in the buffer."""


@functools.lru_cache(maxsize=512)
def _layout(tokens: int, sequences: int, rows: int, width: int) -> tuple[_Section, ...]:
    arrays: tuple[tuple[tuple[int, ...], torch.dtype], ...] = (
        ((sequences + 1,), torch.int32),
        ((sequences,), torch.int32),
        ((tokens,), torch.int64),
        ((tokens,), torch.int64),
        ((tokens,), torch.int64),
        ((rows,), torch.int64),
        ((sequences, width), torch.int32),
    )
    sections: list[_Section] = []
    first = 0
    for shape, dtype in arrays:
        end = first + math.prod(shape) * dtype.itemsize
        sections.append((slice(first, end), dtype, shape))
        first = -(-end // _ALIGN) * _ALIGN
    return tuple(sections)


def _arrays(buffer: torch.Tensor, sections: tuple[_Section, ...]) -> list[torch.Tensor]:
    return [buffer[at].view(dtype).view(shape) for at, dtype, shape in sections]


class PageDirectory:
    """Block ids to pages, by what the stage has been told. Until it is told of any, a block's page is its id."""

    def __init__(self) -> None:
        self.is_told = False
        self._region_of = np.zeros(0, dtype=np.int16)
        self._page_of = np.zeros(0, dtype=np.int32)

    def learn(self, placed: Ints) -> None:
        """int32 `[n, 3]` of (block, region, page)."""
        if not len(placed):
            return
        self.is_told = True
        lacking = int(placed[:, 0].max()) + 1 - len(self._page_of)
        if lacking > 0:
            lacking = max(lacking, len(self._page_of))
            self._region_of = np.concatenate((self._region_of, np.zeros(lacking, dtype=np.int16)))
            self._page_of = np.concatenate((self._page_of, np.zeros(lacking, dtype=np.int32)))
        self._region_of[placed[:, 0]] = placed[:, 1]
        self._page_of[placed[:, 0]] = placed[:, 2]

    def locate(self, tables: Ints) -> tuple[np.ndarray, Ints]:
        """Regions int16 and pages int32 of block tables, `[S, M]` each."""
        if not len(self._page_of):
            return np.zeros(tables.shape, dtype=np.int16), tables
        known = np.minimum(tables, len(self._page_of) - 1)  # what lies beyond a sequence's blocks may be any number
        return self._region_of[known], self._page_of[known]


class StepBuffers:
    """Used by the thread that runs the stage.

    With `buckets`, a step of single tokens is padded to the next of these numbers of sequences, in rows that write to
    page `scratch_page`. With `table_width`, block tables always have so many columns; else as many as a step needs.
    """

    def __init__(
        self, device: torch.device, block_size: int, *, buckets: Sequence[int] = (), table_width: int | None = None,
        scratch_page: int = 0,
    ) -> None:  # fmt: skip
        self._device = device
        self._block_size = block_size
        self._buckets = tuple(sorted(buckets))
        self._width = table_width
        self._scratch_page = scratch_page
        self._is_host = device.type == "cpu"
        self._sides = [_HostSide(pinned=device.type == "cuda") for _ in range(1 if self._is_host else 2)]
        self._turn = 0
        self._on_device = torch.empty(0, dtype=torch.uint8, device=device)

    def fill(self, step: PackedStep, pages: Ints) -> InputBatch:
        """The step's arrays on the device. `pages` int32 `[S, M]` are the local pages of its block tables."""
        if self._is_host and not self._buckets:
            arrays = (
                step.query_start, step.seq_lens, self._slots(step, pages), step.token_ids, step.positions,
                step.logit_rows, np.ascontiguousarray(pages),
            )  # fmt: skip
            return self._batch(step, 0, [torch.from_numpy(array) for array in arrays])
        padding = self._padding(step)
        sequences, tokens = step.num_sequences + padding, step.num_tokens + padding
        rows = len(step.logit_rows)
        width = max(1, pages.shape[1]) if self._width is None else self._width
        sections = _layout(tokens, sequences, rows, width)
        nbytes = sections[-1][0].stop
        side = self._next_side(nbytes)
        starts, lengths, slots, ids, positions, logit_rows, tables = (
            array.numpy() for array in _arrays(side.buffer, sections)
        )
        count, total = step.num_sequences, step.num_tokens
        starts[: count + 1], lengths[:count] = step.query_start, step.seq_lens
        ids[:total], positions[:total], logit_rows[:] = step.token_ids, step.positions, step.logit_rows
        tables[:count, : pages.shape[1]] = pages
        slots[:total] = self._slots(step, pages)
        if padding:
            starts[count + 1 :] = np.arange(total + 1, tokens + 1)
            lengths[count:], ids[total:], positions[total:] = 1, 0, 0
            tables[count:, 0] = self._scratch_page
            slots[total:] = self._scratch_page * self._block_size
        return self._batch(step, padding, _arrays(self._send(side, nbytes), sections))

    def _padding(self, step: PackedStep) -> int:
        """Rows to add. Only steps that decode and nothing else come in buckets."""
        if step.num_decodes < step.num_sequences or step.raw is not None:
            return 0
        return next((size - step.num_sequences for size in self._buckets if size >= step.num_sequences), 0)

    def _slots(self, step: PackedStep, pages: Ints) -> np.ndarray:
        """int64 `[T]`: where each token's K and V go."""
        row = np.arange(step.num_sequences)
        if step.num_decodes < step.num_sequences:
            row = np.repeat(row, np.diff(step.query_start))
        block, offset = np.divmod(step.positions, self._block_size)
        return pages[row, block].astype(np.int64) * self._block_size + offset

    def _next_side(self, nbytes: int) -> _HostSide:
        side = self._sides[self._turn]
        self._turn = (self._turn + 1) % len(self._sides)
        side.make_room(nbytes)
        return side

    def _send(self, side: _HostSide, nbytes: int) -> torch.Tensor:
        """The first bytes of a host side, on the device."""
        if self._is_host:
            return side.buffer
        if self._on_device.nbytes < nbytes:
            self._on_device = torch.empty(_roomy(nbytes), dtype=torch.uint8, device=self._device)
        self._on_device[:nbytes].copy_(side.buffer[:nbytes], non_blocking=True)
        side.sent(self._device)
        return self._on_device

    def _batch(self, step: PackedStep, padding: int, views: Sequence[torch.Tensor]) -> InputBatch:
        starts, lengths, slots, ids, positions, logit_rows, tables = views
        host_start, host_lens = step.query_start.tolist(), step.seq_lens.tolist()
        metadata = AttentionMetadata(
            slot_mapping=slots,
            block_tables=tables,
            query_start=starts,
            seq_lens=lengths,
            num_decodes=step.num_decodes + padding,
            host_query_start=(*host_start, *range(host_start[-1] + 1, host_start[-1] + padding + 1)),
            host_seq_lens=(*host_lens, *(1,) * padding),
            max_query_len=step.max_query_len,
        )
        return InputBatch(ids[None], positions[None], logit_rows if len(logit_rows) else None, metadata)


def _roomy(nbytes: int) -> int:
    return 1 << (max(4096, nbytes) - 1).bit_length()


class _HostSide:
    """A buffer on the host, and the moment from which it may be written again."""

    def __init__(self, *, pinned: bool) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self._pinned = pinned
        self._copied: torch.cuda.Event | None = None

    def make_room(self, nbytes: int) -> None:
        """The buffer has at least so many bytes, and nothing reads it."""
        if self._copied is not None:
            self._copied.synchronize()
        if self.buffer.nbytes < nbytes:
            self.buffer = torch.empty(_roomy(nbytes), dtype=torch.uint8, pin_memory=self._pinned)

    def sent(self, device: torch.device) -> None:
        """A copy to `device` has been queued."""
        if self._pinned:
            self._copied = self._copied or torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(torch.cuda.current_stream(device))
