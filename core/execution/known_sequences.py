"""What a worker knows of the sequences it computes, and the steps it makes of what it is told. No torch here.

All stages in one process share one `KnownSequences`: records are told to it once each, in the order of their steps, and
every stage is given the same `PackedStep`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from core.errors import RecordError
from core.execution.records import PROMPT_LOGPROBS, SAMPLE, Ints, Longs, NewSequence, StepRecord
from core.request import SamplingParams

if TYPE_CHECKING:
    from core.grammars.matching import GrammarState


@dataclass(eq=False, slots=True)
class KnownSequence:
    """A sequence as it was told. `output_token_ids` grows with what is told; `slot` is its row of the block tables;
    `grammar_state` is the last stage's."""

    seq_id: int
    slot: int
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    params: SamplingParams
    seed: int
    end_token_ids: tuple[int, ...]
    num_blocks: int = 0
    grammar_state: GrammarState | None = None

    @classmethod
    def of(cls, new: NewSequence, slot: int) -> KnownSequence:
        tokens = new.token_ids.tolist()
        prompt, output = tokens[: new.num_prompt_tokens], tokens[new.num_prompt_tokens :]
        return cls(new.seq_id, slot, prompt, output, new.params, new.seed, new.end_token_ids)

    @property
    def suppress_token_ids(self) -> tuple[int, ...]:
        """What may not be sampled next, because `min_tokens` is not reached."""
        return self.end_token_ids if len(self.output_token_ids) < self.params.min_tokens else ()

    def tokens(self, start: int, end: int) -> list[int]:
        """Token ids at positions `start .. end - 1`."""
        prompt = len(self.prompt_token_ids)
        if start >= prompt:
            return self.output_token_ids[start - prompt : end - prompt]
        return (self.prompt_token_ids[start:end] + self.output_token_ids[: max(0, end - prompt)])[: end - start]


@dataclass(frozen=True, slots=True)
class SampledRow:
    """A sequence whose next token is sampled from row `logits` of the logits, at `position` of the sequence."""

    sequence: KnownSequence
    logits: int
    position: int


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Rows `first .. first + len(targets) - 1` of the logits predict the prompt tokens `targets`."""

    sequence: KnownSequence
    first: int
    targets: list[int]


@dataclass(frozen=True, slots=True)
class PackedStep:
    """A step's tokens in one batch without padding, on the host. The same for all stages of a process.

    Attributes:
        token_ids, positions: int64 `[T]`. query_start: int32 `[S + 1]`. seq_lens: int32 `[S]`, with this step's tokens.
        tables: int32 `[S, M]`, block ids; entries beyond a sequence's blocks are whatever they are.
        num_decodes: leading rows with one token. max_query_len: tokens of the longest row.
        logit_rows: int64 `[R]`, rows of the batch whose logits are wanted; empty: nobody's.
        sampled, prompts: which rows of the logits are whose.
        raw: None, or what is wanted of `logit_rows` instead of samples.
        ended: sequences to forget.
        lengths: of each row, tokens of its prompt, and all that are known.
    """

    step: int
    token_ids: Longs
    positions: Longs
    query_start: Ints
    seq_lens: Ints
    tables: Ints
    num_decodes: int
    max_query_len: int
    logit_rows: Longs
    sampled: tuple[SampledRow, ...] = ()
    prompts: tuple[PromptRows, ...] = ()
    raw: str | None = None
    ended: tuple[int, ...] = ()
    lengths: tuple[tuple[int, int], ...] = ()

    @property
    def num_sequences(self) -> int:
        return len(self.seq_lens)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


class KnownSequences:
    """Used by one thread: whoever tells stages of steps."""

    def __init__(self) -> None:
        self._known: dict[int, KnownSequence] = {}
        self._tables = np.zeros((8, 16), dtype=np.int32)
        self._free: list[int] = list(range(8))
        self._last: PackedStep | None = None

    def __len__(self) -> int:
        return len(self._known)

    def take(self, record: StepRecord) -> PackedStep:
        """Learn what a record tells and pack its step. Raises `RecordError` for what does not follow on what is known.

        A record that is told again, to another stage, gives what it gave the first time.
        """
        if self._last is None or self._last.step != record.step:
            self._last = self._take(record)
        return self._last

    def _take(self, record: StepRecord) -> PackedStep:
        for seq_id in record.ended.tolist():
            self._forget(seq_id)
        for new in record.new:
            self._learn(new)
        try:
            rows = [self._known[seq_id] for seq_id in record.seq_ids.tolist()]
        except KeyError as error:
            raise RecordError(f"step {record.step} computes sequence {error}, which has not been told") from error
        self._extend(rows, record)
        self._change_blocks(rows, record.blocks)
        return self._pack(rows, record)

    def _forget(self, seq_id: int) -> None:
        known = self._known.pop(seq_id, None)
        if known is not None:
            self._free.append(known.slot)

    def _learn(self, new: NewSequence) -> None:
        self._forget(new.seq_id)
        if not self._free:
            rows = len(self._tables)
            self._tables = np.concatenate((self._tables, np.zeros_like(self._tables)))
            self._free.extend(range(rows, 2 * rows))
        known = self._known[new.seq_id] = KnownSequence.of(new, self._free.pop())
        self._make_width(len(new.blocks))
        self._tables[known.slot, : len(new.blocks)] = new.blocks
        known.num_blocks = len(new.blocks)

    def _make_width(self, blocks: int) -> None:
        if blocks > self._tables.shape[1]:
            wider = np.zeros((len(self._tables), 1 << (blocks - 1).bit_length()), dtype=np.int32)
            wider[:, : self._tables.shape[1]] = self._tables
            self._tables = wider

    def _extend(self, rows: Sequence[KnownSequence], record: StepRecord) -> None:
        if not len(record.tokens):
            return
        tokens, at = record.tokens.tolist(), 0
        for known, told in zip(rows, record.told.tolist(), strict=True):
            known.output_token_ids.extend(tokens[at : at + told])
            at += told

    def _change_blocks(self, rows: Sequence[KnownSequence], blocks: Ints) -> None:
        for row, index, block in blocks.tolist():
            known = rows[row]
            if index > known.num_blocks:
                raise RecordError(
                    f"sequence {known.seq_id} has {known.num_blocks} blocks and is told of number {index}"
                )
            self._make_width(index + 1)
            self._tables[known.slot, index] = block
            known.num_blocks = max(known.num_blocks, index + 1)

    def _pack(self, rows: Sequence[KnownSequence], record: StepRecord) -> PackedStep:
        starts, counts = record.starts.tolist(), record.counts.tolist()
        tokens: list[int] = []
        logit_rows: list[int] = []
        query_start = [0]
        sampled: list[SampledRow] = []
        prompts: list[PromptRows] = []
        for known, start, count, flags in zip(rows, starts, counts, record.flags.tolist(), strict=True):
            first = len(tokens)
            targets = known.prompt_token_ids[start + 1 : start + 1 + count] if flags & PROMPT_LOGPROBS else ()
            if targets:
                prompts.append(PromptRows(known, len(logit_rows), targets))
                logit_rows.extend(range(first, first + len(targets)))
            if flags & SAMPLE:
                sampled.append(SampledRow(known, len(logit_rows), start + count))
                logit_rows.append(first + count - 1)
            tokens += known.tokens(start, start + count)
            query_start.append(query_start[-1] + count)
        if len(tokens) != query_start[-1]:
            raise RecordError(f"step {record.step} computes tokens that have not been told")
        positions = record.starts.astype(np.int64)
        if len(tokens) > len(rows):
            offsets = np.repeat(positions - query_start[:-1], record.counts)
            positions = np.arange(len(tokens)) + offsets
        width = max((known.num_blocks for known in rows), default=0)
        raw = record.raw
        return PackedStep(
            step=record.step,
            token_ids=np.array(tokens, dtype=np.int64),
            positions=positions,
            query_start=np.array(query_start, dtype=np.int32),
            seq_lens=record.starts + record.counts,
            tables=self._tables[[known.slot for known in rows], :width],
            num_decodes=counts.count(1),
            max_query_len=max(counts, default=0),
            logit_rows=np.array(logit_rows, dtype=np.int64) if raw is None else raw.rows.astype(np.int64),
            sampled=tuple(sampled),
            prompts=tuple(prompts),
            raw=None if raw is None else raw.output,
            ended=tuple(record.ended.tolist()),
            lengths=tuple((prompt := len(each.prompt_token_ids), prompt + len(each.output_token_ids)) for each in rows),
        )
