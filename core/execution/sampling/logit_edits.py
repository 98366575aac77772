"""What changes logits before temperature: logit_bias, suppressed tokens, then the three penalties.

A penalty changes only tokens that a sequence has already seen, so the work per step follows the number of distinct
tokens in the contexts, not the vocabulary. Counts are kept per sequence, from the first step that needs them, and
extended by the tokens that were added since.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from core.execution.sampler import SamplingRow


class TokenCounts:
    """Distinct tokens of one sequence and how often each occurs in its output.

    `ids` and `counts` grow by doubling; the first `size` entries are in use. Tokens of the prompt alone count 0.
    """

    def __init__(self, prompt_token_ids: Sequence[int], vocab_size: int) -> None:
        seen = np.unique(np.asarray(prompt_token_ids, dtype=np.int64))
        seen = seen[(seen >= 0) & (seen < vocab_size)]
        self.num_output_tokens = 0
        self._vocab_size = vocab_size
        self._size = len(seen)
        self._ids = np.zeros(max(64, 2 * len(seen)), dtype=np.int64)
        self._ids[: len(seen)] = seen
        self._counts = np.zeros(len(self._ids), dtype=np.int32)
        self._entries = {token: entry for entry, token in enumerate(seen.tolist())}

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        return self._ids[: self._size]

    @property
    def counts(self) -> npt.NDArray[np.int32]:
        return self._counts[: self._size]

    def extend(self, output_token_ids: Sequence[int]) -> None:
        """Count the output tokens that were added since the last call."""
        for token in output_token_ids[self.num_output_tokens :]:
            if 0 <= token < self._vocab_size:
                entry = self._entry(token)  # may replace the arrays
                self._counts[entry] += 1
        self.num_output_tokens = len(output_token_ids)

    def _entry(self, token: int) -> int:
        entry = self._entries.get(token)
        if entry is None:
            entry = self._size
            if entry == len(self._ids):
                self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
                self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            self._ids[entry] = token
            self._entries[token] = entry
            self._size += 1
        return entry


class LogitEditor:
    """Applies edits to a batch in place. Holds per-sequence state until `forget`."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._counts: dict[int, TokenCounts] = {}
        self._biases: dict[int, tuple[Mapping[int, float], npt.NDArray[np.int64], npt.NDArray[np.float32]]] = {}

    def forget(self, seq_ids: Iterable[int]) -> None:
        for seq_id in seq_ids:
            self._counts.pop(seq_id, None)
            self._biases.pop(seq_id, None)

    def apply(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
        """Edit contiguous float32 `logits` `[R, V]` in place."""
        flat = logits.view(-1)
        self._add_biases(flat, rows)
        self._suppress(flat, rows)
        self._penalize(flat, rows)

    def _add_biases(self, flat: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
        found = [(index, *self._bias(row)) for index, row in enumerate(rows) if row.params.logit_bias]
        if found:
            positions = np.concatenate([ids + index * self._vocab_size for index, ids, _ in found])
            values = np.concatenate([values for _, _, values in found])
            flat.index_add_(0, self._tensor(positions), self._tensor(values))

    def _bias(self, row: SamplingRow) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        bias = row.params.logit_bias
        known = self._biases.get(row.seq_id)
        if known is None or known[0] is not bias:
            ids = np.fromiter(bias.keys(), dtype=np.int64, count=len(bias))
            values = np.fromiter(bias.values(), dtype=np.float32, count=len(bias))
            inside = (ids >= 0) & (ids < self._vocab_size)
            known = (bias, ids[inside], values[inside])
            self._biases[row.seq_id] = known
        return known[1], known[2]

    def _suppress(self, flat: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
        positions = [
            index * self._vocab_size + token
            for index, row in enumerate(rows)
            for token in row.suppress_token_ids
            if 0 <= token < self._vocab_size
        ]
        if positions:
            flat.index_fill_(0, self._tensor(np.array(positions, dtype=np.int64)), -torch.inf)

    def _penalize(self, flat: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
        found = [(index, row.params, self._token_counts(row)) for index, row in enumerate(rows) if row.params.penalized]
        if not found:
            return
        sizes = [len(counts.ids) for _, _, counts in found]
        positions = self._tensor(np.concatenate([counts.ids + index * self._vocab_size for index, _, counts in found]))
        counts = self._tensor(np.concatenate([counts.counts for _, _, counts in found])).to(torch.float32)
        repetition, frequency, presence = (
            self._tensor(
                np.repeat(np.array([getattr(params, name) for _, params, _ in found], dtype=np.float32), sizes)
            )
            for name in ("repetition_penalty", "frequency_penalty", "presence_penalty")
        )
        values = flat[positions]
        values = torch.where(values > 0, values / repetition, values * repetition)
        values -= frequency * counts
        values -= presence * (counts > 0)
        flat[positions] = values

    def _token_counts(self, row: SamplingRow) -> TokenCounts:
        counts = self._counts.get(row.seq_id)
        if counts is None or counts.num_output_tokens > len(row.output_token_ids):
            counts = TokenCounts(row.prompt_token_ids, self._vocab_size)
            self._counts[row.seq_id] = counts
        counts.extend(row.output_token_ids)
        return counts

    def _tensor(self, values: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device)
