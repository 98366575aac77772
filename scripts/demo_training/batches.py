"""What each step of training sees. It depends on the seed and the number of the step alone, so training can go on
from any step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

import demo_corpus as corpus
import torch
from transformers import PreTrainedTokenizerFast

IGNORED = -100
"""The label of a token that is not learnt."""
SHORT, LONG = 320, 1024
"""Tokens of a row; most conversations are short."""
LONG_EVERY = 16
FOCUS_FROM = 0.5
"""The share of training after which the mix leans to what takes longest to learn."""
DOUBLE_FROM = 0.6
"""The share of training after which a step has twice as many tokens: late steps gain more from less noise."""


class Batch(NamedTuple):
    """Ids, shifted labels, positions that restart with each document, and the mask that keeps documents apart."""

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor


def encode(tokenizer: PreTrainedTokenizerFast, segments: corpus.Segments) -> tuple[list[int], list[int]]:
    """Token ids of a document, and the labels: the ids that the model has to write, `IGNORED` elsewhere."""
    ids: list[int] = []
    labels: list[int] = []
    for text, learnt in segments:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        ids += tokens
        labels += tokens if learnt else [IGNORED] * len(tokens)
    return ids, labels


Row = tuple[list[int], list[int], list[int]]
"""Ids, labels, and the number of the document within the row, of one length."""


def rows(
    documents: Iterator[corpus.Segments], tokenizer: PreTrainedTokenizerFast, length: int, count: int
) -> list[Row]:
    """As many documents as `count` rows hold, the longest put in first; the few that then fit nowhere are left out."""
    drawn: list[tuple[list[int], list[int]]] = []
    room = count * length
    for segments in documents:
        ids, labels = encode(tokenizer, segments)
        room -= min(len(ids), length)
        if room < 0:
            break
        drawn.append((ids[:length], labels[:length]))
    packed: list[Row] = [([], [], []) for _ in range(count)]
    for ids, labels in sorted(drawn, key=lambda document: -len(document[0])):
        row = next((row for row in packed if len(row[0]) + len(ids) <= length), None)
        if row is not None:
            number = row[2][-1] + 1 if row[2] else 0
            row[0].extend(ids)
            row[1].extend(labels)
            row[2].extend([number] * len(ids))
    for ids, labels, owner in packed:
        gap = length - len(ids)
        ids += [tokenizer.pad_token_id] * gap
        labels += [IGNORED] * gap
        owner += [owner[-1] + 1 if owner else 0] * gap
    return packed


@dataclass(frozen=True, slots=True)
class Lessons:
    """The batches of one training.

    Attributes:
        seed: of the text.
        tokens: tokens of a step, before they are doubled.
    """

    tokenizer: PreTrainedTokenizerFast
    seed: int
    tokens: int

    def batch(self, step: int, progress: float) -> Batch:
        """What step `step` learns from; `progress` is the share of training that is over, 0 to 1."""
        source = f"{self.seed}/{step}"
        tokens = self.tokens * (2 if progress > DOUBLE_FROM else 1)
        documents = corpus.documents(source, focus=progress > FOCUS_FROM)
        if step % LONG_EVERY != LONG_EVERY - 1:
            return pack(rows(documents, self.tokenizer, SHORT, max(1, tokens // SHORT)))
        count = max(1, tokens // LONG)
        return pack(rows(chain(islice(corpus.long_documents(source), count), documents), self.tokenizer, LONG, count))


def pack(packed: list[Row]) -> Batch:
    """Rows of one length as tensors."""
    ids, labels, owner = torch.tensor(packed).unbind(1)
    length = ids.shape[1]
    index = torch.arange(length)
    labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], 1)
    same = owner[:, :, None] == owner[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    starts = torch.where(torch.nn.functional.pad(owner[:, 1:] != owner[:, :-1], (1, 0), value=True), index, 0)
    return Batch(ids, labels, index - starts.cummax(1).values, (same & causal)[:, None])
