"""Choosing the next token of every row of a step.

::

    logits -> float32 -> raw log-probabilities (if asked for)
           -> mask of a grammar -> logit_bias -> suppressed tokens -> repetition, frequency, presence penalty
           -> greedy: argmax
           -> else:   / temperature -> min_p -> top_k -> top_p -> draw

A row's token depends on its logits, parameters, seed and position, never on the rest of the batch: random numbers are
hashes of (seed, position) and each operation works on rows one by one. What nobody in a step uses costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from core.errors import StepFailedError
from core.execution.records import SampledToken
from core.execution.sampling import draws
from core.execution.sampling.draws import Filters, draw_filtered, is_filtered, to_host
from core.execution.sampling.logit_edits import LogitEditor
from core.execution.sampling.logprobs import Reported, prompt_logprobs, rows_per_chunk, token_logprobs
from core.execution.sampling.random import derive_seed, fresh_seed, uniforms
from core.request import SamplingParams

if TYPE_CHECKING:
    from core.grammars.matching import Bits

__all__ = [
    "NonFiniteLogitsError",
    "SampledToken",
    "Sampler",
    "SamplingRow",
    "derive_seed",
    "fresh_seed",
    "prompt_logprobs",
]

GREEDY_TEMPERATURE = 1e-5
"""Temperatures below this are greedy, as in vLLM: dividing by them would overflow."""


class NonFiniteLogitsError(StepFailedError):
    """Rows whose logits hold a NaN or an infinity above, or no token that may be chosen.

    `seq_ids` names them. Nothing is kept of the failed call: the other rows may be sampled again, with equal results.
    """

    def __init__(self, seq_ids: Sequence[int]) -> None:
        names = ", ".join(str(seq_id) for seq_id in seq_ids)
        super().__init__(f"The model produced logits that cannot be sampled (NaN or infinite) for sequence {names}.")
        self.seq_ids = tuple(seq_ids)


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """One row to be sampled. Written by the runner from what the scheduler decided.

    `seed` is the sequence's own, resolved; `position` counts the tokens before the sampled one, prompt and output.
    `suppress_token_ids` may not be chosen (end tokens while `min_tokens` is not reached). `mask`, one bit a token, has
    what a grammar allows.
    """

    seq_id: int
    params: SamplingParams
    seed: int
    position: int
    prompt_token_ids: Sequence[int] = ()
    output_token_ids: Sequence[int] = ()
    suppress_token_ids: tuple[int, ...] = ()
    mask: Bits | None = None

    @property
    def greedy(self) -> bool:
        return self.params.temperature < GREEDY_TEMPERATURE

    @property
    def edited(self) -> bool:
        """Whether the row's logits differ from the model's before temperature, a mask apart."""
        params = self.params
        return bool(params.logit_bias) or bool(self.suppress_token_ids) or params.penalized


@dataclass(frozen=True, slots=True)
class _Chunk:
    """What was chosen for some rows, on the device: token ids `[R]`, -1 where there is none; rows at `asking` also want
    log-probabilities, with `tops` alternatives each."""

    token_ids: torch.Tensor
    asking: list[int]
    tops: list[int]
    found: Reported | None


class Sampler:
    """Samples batches of rows. Keeps counts for sequences with penalties until `forget`. One thread at a time.

    Draws need float64, which Apple's GPUs do not have: their logits are sampled in main memory, which is the same
    memory. Rows that are greedy and plain, alone in a step, are not moved.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = torch.device("cpu" if torch.device(device).type == "mps" else device)
        self._rows_per_chunk = rows_per_chunk(vocab_size, self._device)
        self._editor: LogitEditor | None = None  # made for the first row that needs it

    def forget(self, seq_ids: Iterable[int]) -> None:
        """Drop the state of sequences that ended or were preempted; it is rebuilt when one comes back."""
        if self._editor is not None:
            self._editor.forget(seq_ids)

    def sample(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        """Choose a token for each row of `logits` `[R, V]` (any float type; as they were afterwards).

        Columns from `vocab_size` up are padding and never chosen. Raises `NonFiniteLogitsError`, naming the sequences.
        """
        if logits.dim() != 2 or logits.shape[0] != len(rows) or logits.shape[1] < self._vocab_size:
            raise ValueError(f"logits {tuple(logits.shape)} do not fit {len(rows)} rows, {self._vocab_size} tokens")
        if not rows:
            return []
        logits = logits[:, : self._vocab_size]
        if all(row.greedy and row.params.logprobs is None and not row.edited for row in rows):
            with _masked(logits, rows):
                sampled = [SampledToken(token) for token in _argmax(logits).tolist()]
        else:
            if logits.device.type == "mps":
                logits = logits.cpu()
            step = self._rows_per_chunk
            chunks = [
                self._sample_chunk(logits[start : start + step], rows[start : start + step])
                for start in range(0, len(rows), step)
            ]
            sampled = _records(chunks)
        failed = [row.seq_id for row, item in zip(rows, sampled, strict=True) if item.token_id < 0]
        if failed:
            raise NonFiniteLogitsError(failed)
        return sampled

    def _sample_chunk(self, raw: torch.Tensor, rows: Sequence[SamplingRow]) -> _Chunk:
        asking = [index for index, row in enumerate(rows) if row.params.logprobs is not None]
        tops = [rows[index].params.logprobs or 0 for index in asking]
        logprobs = torch.log_softmax(_select(raw, asking).to(torch.float32), dim=1) if asking else None
        with _masked(raw, rows):
            token_ids = self._choose(self._edited(raw, rows), rows)
        if logprobs is None:
            return _Chunk(token_ids, [], [], None)
        found = Reported.of(logprobs, _select(token_ids, asking).clamp(min=0), max(tops))
        return _Chunk(token_ids, asking, tops, found)

    def _edited(self, raw: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
        """Logits as float32, with biases and penalties; `raw` itself if nothing changes it."""
        logits = raw.to(torch.float32)
        if any(row.edited for row in rows):
            if logits is raw or not logits.is_contiguous():
                logits = logits.clone(memory_format=torch.contiguous_format)
            self._editor = self._editor or LogitEditor(self._vocab_size, self._device)
            self._editor.apply(logits, rows)
        return logits

    def _choose(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
        """Token ids, int64 `[R]`, -1 where there is none to choose."""
        greedy = [index for index, row in enumerate(rows) if row.greedy]
        drawn = [index for index, row in enumerate(rows) if not row.greedy]
        if not drawn:
            return _argmax(logits)
        if not greedy:
            return self._draw(logits, rows)
        token_ids = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        token_ids[greedy] = _argmax(_select(logits, greedy))
        token_ids[drawn] = self._draw(_select(logits, drawn), [rows[index] for index in drawn])
        return token_ids

    def _draw(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
        temperatures = [row.params.temperature for row in rows]
        if any(temperature != 1.0 for temperature in temperatures):
            logits = logits / torch.tensor(temperatures, dtype=torch.float32, device=logits.device)[:, None]
        probs = torch.softmax(logits, dim=1)
        sums = draws.block_sums(probs)
        totals = sums.cumsum(dim=1)[:, -1]
        uniform = torch.from_numpy(uniforms([row.seed for row in rows], [row.position for row in rows]))
        uniform = uniform.to(logits.device)

        filtered = [index for index, row in enumerate(rows) if is_filtered(row.params, self._vocab_size)]
        free = [index for index, row in enumerate(rows) if not is_filtered(row.params, self._vocab_size)]
        token_ids = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        if free:
            token_ids[free] = draws.draw_by_weight(_select(probs, free), _select(sums, free), _select(uniform, free))
        if filtered:
            filters = Filters.of([rows[index].params for index in filtered], self._vocab_size)
            token_ids[filtered] = draw_filtered(
                _select(logits, filtered), _select(probs, filtered), _select(totals, filtered),
                _select(uniform, filtered), filters,
            )  # fmt: skip
        return torch.where(totals.isfinite(), token_ids, -1)


def _masked(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> AbstractContextManager[None]:
    """Where no row has a mask, nothing."""
    if all(row.mask is None for row in rows):
        return nullcontext()
    from core.execution.sampling.masks import masked

    return masked(logits, rows)


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    """Most likely token of each row, int64 `[R]`; -1 if the largest logit is not finite (a NaN counts as largest)."""
    token_ids = draws.argmax(logits)
    finite = logits.gather(1, token_ids[:, None]).squeeze(1).isfinite()
    return torch.where(finite, token_ids, -1)


def _select(tensor: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """The named rows, in ascending order; no copy if they are all of them."""
    return tensor if len(rows) == tensor.shape[0] else tensor[rows]


def _records(chunks: Sequence[_Chunk]) -> list[SampledToken]:
    """What all chunks chose, brought to the host together."""
    tensors: list[torch.Tensor] = []
    for chunk in chunks:
        found = chunk.found
        tensors += [chunk.token_ids] if found is None else [
            chunk.token_ids, found.chosen, found.top_values, found.top_ids,
        ]  # fmt: skip
    parts = iter(to_host(*tensors))
    sampled: list[SampledToken] = []
    for chunk in chunks:
        tokens = next(parts).tolist()
        mine = [SampledToken(token) for token in tokens]
        if chunk.found is not None:
            chosen = [tokens[index] for index in chunk.asking]
            records = token_logprobs(chosen, next(parts), next(parts), next(parts), chunk.tops)
            for index, record in zip(chunk.asking, records, strict=True):
                if tokens[index] >= 0:
                    mine[index] = SampledToken(tokens[index], record)
        sampled += mine
    return sampled
