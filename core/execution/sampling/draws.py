"""Row-wise primitives over `[R, V]` whose result for a row does not depend on the other rows.

Reductions over a whole row may be split among threads, and so round differently, when the batch holds one row alone.
Here a row is reduced in blocks first. On the CPU blocks are also several times faster than `argmax` and `cumsum`.

On them, min_p, top_k and top_p, and a draw from what they leave. Tokens are put in one order, most likely first and
equals by id, so that each filter keeps a prefix of it:

* min_p keeps tokens at least `min_p` times as likely as the most likely one;
* top_k keeps tokens at least as likely as the k-th (all that equal it, as in Hugging Face's warper);
* top_p keeps the smallest prefix whose share of what is left reaches `top_p`.

Sorting a vocabulary is slow, so a row is first tried with its few largest logits. They settle it if the prefix ends
strictly above the last of them; otherwise the next tier has a go, and at last the whole row is sorted (on a GPU at
once, so that it need not be waited for). A row's tier depends on that row alone, and each tier gives the same prefix,
cumulative sums and token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from core.request import SamplingParams

BLOCK = 512
PEAK_BLOCK = 32
SMALL_COUNT = 256


def argmax(values: torch.Tensor) -> torch.Tensor:
    """Index of each row's first maximum, int64 `[R]`; of a NaN if there is one."""
    vocab_size = values.shape[1]
    if values.device.type != "cpu" or vocab_size < 2 * BLOCK:
        return values.argmax(dim=1)
    block = _block_reduce(values, "amax", None).argmax(dim=1, keepdim=True)
    columns = block * BLOCK + torch.arange(BLOCK, device=values.device)
    columns.clamp_(max=vocab_size - 1)
    inner = values.gather(1, columns).argmax(dim=1, keepdim=True)
    return columns.gather(1, inner).squeeze(1)


def block_sums(values: torch.Tensor) -> torch.Tensor:
    """Sums of consecutive blocks of `BLOCK` columns, float64 `[R, ceil(V / BLOCK)]`.

    On the CPU a block is summed as float32, where float64 would first copy everything; its order of additions is fixed.
    """
    dtype = values.dtype if values.device.type == "cpu" else torch.float64
    return _block_reduce(values, "sum", dtype).to(torch.float64)


def _block_reduce(values: torch.Tensor, operation: str, dtype: torch.dtype | None) -> torch.Tensor:
    rows, vocab_size = values.shape
    num_whole = vocab_size // BLOCK
    parts = [values[:, : num_whole * BLOCK].view(rows, num_whole, BLOCK), values[:, None, num_whole * BLOCK :]]
    reduced = [
        part.amax(dim=2) if operation == "amax" else part.sum(dim=2, dtype=dtype)
        for part in parts
        if part.shape[1] and part.shape[2]
    ]
    return reduced[0] if len(reduced) == 1 else torch.cat(reduced, dim=1)


def pick(cumulative: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """First column of float64 `cumulative` `[R, N]` that exceeds `target` `[R]`: one with a positive weight."""
    column = torch.searchsorted(cumulative.contiguous(), target[:, None].contiguous(), right=True)
    return column.clamp_(max=cumulative.shape[1] - 1)


def below(limit: torch.Tensor, fraction: torch.Tensor) -> torch.Tensor:
    """`fraction * limit`, held below `limit` where rounding would reach it."""
    return torch.minimum(fraction * limit, torch.nextafter(limit, torch.zeros_like(limit)))


def draw_by_weight(weights: torch.Tensor, sums: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Inverse of the cumulative distribution in order of columns, int64 `[R]`.

    `weights` `[R, V]` need not add up to one; `sums` are their `block_sums`; `uniform` float64 `[R]` lies in [0, 1).
    """
    vocab_size = weights.shape[1]
    cumulative = sums.cumsum(dim=1)
    target = below(cumulative[:, -1], uniform)
    block = pick(cumulative, target)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp(min=0)), 0.0).squeeze(1)
    columns = block * BLOCK + torch.arange(BLOCK, device=weights.device)
    inside = columns < vocab_size
    columns.clamp_(max=vocab_size - 1)
    inner = torch.where(inside, weights.gather(1, columns), 0.0).to(torch.float64).cumsum(dim=1)
    share = ((target - before) / sums.gather(1, block).squeeze(1)).clamp_(max=1.0)
    residual = below(inner[:, -1], share)
    return columns.gather(1, pick(inner, residual)).squeeze(1)


def largest(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest of each row and their columns, both `[R, count]`: largest first, equals by column.

    Which of several values equal to the last one are among them is left open, unless `count` is the row's length.
    """
    vocab_size = values.shape[1]
    if values.device.type == "cpu" and values.dtype == torch.float32:
        num_blocks = vocab_size // PEAK_BLOCK
        if count > SMALL_COUNT or count >= vocab_size:
            return _largest_by_keys(values, min(count, vocab_size))
        if count <= num_blocks and 4 * count * PEAK_BLOCK <= vocab_size:
            return _in_order(*_largest_by_blocks(values, count, num_blocks))
    if count >= vocab_size:
        result = values.sort(dim=1, descending=True, stable=True)
        return result.values, result.indices
    return _in_order(*values.topk(count, dim=1))


def _in_order(top: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Descending values with equals put in order of columns."""
    if top.device.type != "cpu" or bool((top[:, 1:] == top[:, :-1]).any()):
        columns, order = columns.sort(dim=1)
        top, order = top.gather(1, order).sort(dim=1, descending=True, stable=True)
        columns = columns.gather(1, order)
    return top, columns


def _largest_by_blocks(values: torch.Tensor, count: int, num_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Top values by way of the `count` blocks with the largest maxima, which hold them; the rest of the row is kept."""
    rows = values.shape[0]
    whole = num_blocks * PEAK_BLOCK
    peaks = values[:, :whole].view(rows, num_blocks, PEAK_BLOCK).amax(dim=2)
    blocks = peaks.topk(count, dim=1, sorted=False).indices
    columns = (blocks[:, :, None] * PEAK_BLOCK + torch.arange(PEAK_BLOCK)).flatten(1)
    tail = torch.arange(whole, values.shape[1]).expand(rows, -1)
    columns = torch.cat((columns, tail), dim=1)
    top, order = values.gather(1, columns).topk(count, dim=1)
    return top, columns.gather(1, order)


def _largest_by_keys(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Top values of float32 rows as integers (value, then column): numpy sorts those several times faster."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal 0.0
    bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF)).bitwise_not_()  # now ascends as values descend
    keys = bits.to(torch.int64).bitwise_left_shift_(32)
    keys += torch.arange(values.shape[1])
    array = keys.numpy()
    if count < values.shape[1]:
        array = np.ascontiguousarray(np.partition(array, count - 1, axis=1)[:, :count])
    columns = torch.from_numpy(np.sort(array, axis=1)).bitwise_and_(0xFFFFFFFF)
    return values.gather(1, columns), columns


def to_host(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors in main memory, by one copy."""
    if tensors[0].device.type == "cpu":
        return list(tensors)
    packed = torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]).cpu()
    parts = torch.split(packed, [tensor.nbytes for tensor in tensors])
    return [part.clone().view(tensor.dtype).view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


# -- filters ----------------------------------------------------------------------------------------------------------

CANDIDATE_TIERS = (64, 8192)


def is_filtered(params: SamplingParams, vocab_size: int) -> bool:
    return params.top_p < 1.0 or params.min_p > 0.0 or 0 < params.top_k < vocab_size


@dataclass(frozen=True, slots=True)
class Filters:
    """Thresholds per row `[R]`. `top_k` is the vocabulary's size where off."""

    top_k: npt.NDArray[np.int64]
    top_p: npt.NDArray[np.float64]
    min_p: npt.NDArray[np.float64]

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocab_size: int) -> Filters:
        top_k = [item.top_k if 0 < item.top_k < vocab_size else vocab_size for item in params]
        return cls(
            np.array(top_k, dtype=np.int64),
            np.array([item.top_p for item in params], dtype=np.float64),
            np.array([item.min_p for item in params], dtype=np.float64),
        )

    def rows(self, index: npt.NDArray[np.int64]) -> Filters:
        return Filters(self.top_k[index], self.top_p[index], self.min_p[index])


def draw_filtered(
    logits: torch.Tensor,
    probs: torch.Tensor,
    totals: torch.Tensor,
    uniform: torch.Tensor,
    filters: Filters,
    tiers: Sequence[int] = CANDIDATE_TIERS,
) -> torch.Tensor:
    """Draw one token per row, int64 `[R]`.

    `logits` `[R, V]` are scaled by temperature; `probs` float32 `[R, V]` are their softmax and `totals` float64 `[R]`
    the sums of `probs`; `uniform` float64 `[R]` lies in [0, 1). Rows with NaN yield some token without an error.
    """
    num_rows, vocab_size = logits.shape
    tokens = torch.zeros(num_rows, dtype=torch.int64, device=logits.device)
    pending = np.arange(num_rows)
    if logits.device.type != "cpu":
        tiers = ()  # whether a tier settles a row would have to be asked of the device
    for size in (*(size for size in tiers if size < vocab_size), vocab_size):
        whole = size == vocab_size
        fits = filters.top_k[pending]
        tried = pending[(fits < size) | (fits == vocab_size)]
        if not len(tried):
            continue
        index = torch.from_numpy(tried).to(logits.device)
        mine = slice(None) if len(tried) == num_rows else index
        top, columns = largest(logits[mine], size)
        likely = probs[mine].gather(1, columns).to(torch.float64)
        column, settled = _draw_from(top, likely, totals[mine], uniform[mine], filters.rows(tried), whole)
        tokens[index] = columns.gather(1, column).squeeze(1)
        if whole:
            break
        pending = np.setdiff1d(pending, tried[settled.cpu().numpy()], assume_unique=True)
        if not len(pending):
            break
    return tokens


def _draw_from(
    top: torch.Tensor, probs: torch.Tensor, totals: torch.Tensor, uniform: torch.Tensor, filters: Filters, whole: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """From the largest logits `top` `[R, N]` of some rows (`whole`: all of them), in order, with their probabilities.

    Returns columns, `[R, 1]`, and whether the tier settles each row, bool `[R]`.
    """
    device, size = top.device, top.shape[1]
    top_k, top_p, min_p, limited = (
        torch.from_numpy(values).to(device)[:, None]
        for values in (filters.top_k, filters.top_p, filters.min_p, (filters.top_k <= size) | (filters.min_p > 0.0))
    )

    def ends_inside(last: torch.Tensor) -> torch.Tensor:
        """Whether no token outside the tier could equal the one at `last` `[R, 1]`."""
        return torch.ones_like(last, dtype=torch.bool) if whole else top.gather(1, last) > top[:, -1:]

    kept = top >= top.gather(1, top_k.clamp(max=size) - 1)
    kept &= probs >= min_p * probs[:, :1]
    cumulative = probs.cumsum(dim=1)
    last = _last(kept)
    settled = ~limited | ends_inside(last)
    mass = torch.where(limited, cumulative.gather(1, last), totals[:, None])

    before = torch.cat((torch.zeros_like(mass), cumulative[:, :-1]), dim=1)
    kept &= before < top_p * mass
    last = _last(kept)
    settled &= ends_inside(last)
    target = below(cumulative.gather(1, last).squeeze(1), uniform)
    return torch.minimum(pick(cumulative, target), last), settled.squeeze(1)


def _last(kept: torch.Tensor) -> torch.Tensor:
    """Index `[R, 1]` of the last element of a prefix that is given as a mask `[R, N]`."""
    return kept.sum(dim=1, keepdim=True).clamp_(min=1) - 1
