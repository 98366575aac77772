"""What each step of training sees. It depends on the seed and the number of the step alone, so training can go on
from any step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import demo_corpus as corpus
import torch
from transformers import PreTrainedTokenizerFast

IGNORED = -100
"""The label of a token that is not learnt."""
SHORT, LONG = 256, 1024
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


def rows(
    documents: Iterator[corpus.Segments], tokenizer: PreTrainedTokenizerFast, length: int
) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """Documents packed into rows of one length: ids, labels, and the number of the document within the row."""
    ids: list[int] = []
    labels: list[int] = []
    owner: list[int] = []
    count = 0
    for segments in documents:
        new_ids, new_labels = encode(tokenizer, segments)
        new_ids, new_labels = new_ids[:length], new_labels[:length]
        if len(ids) + len(new_ids) > length:
            gap = length - len(ids)
            yield ids + [tokenizer.pad_token_id] * gap, labels + [IGNORED] * gap, owner + [count] * gap
            ids, labels, owner, count = [], [], [], 0
        ids += new_ids
        labels += new_labels
        owner += [count] * len(new_ids)
        count += 1


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
        if step % LONG_EVERY == LONG_EVERY - 1:
            length, documents = LONG, corpus.long_documents(source)
        else:
            length, documents = SHORT, corpus.documents(source, focus=progress > FOCUS_FROM)
        tokens = self.tokens * (2 if progress > DOUBLE_FROM else 1)
        return pack(list(islice(rows(documents, self.tokenizer, length), max(1, tokens // length))))


def pack(packed: list[tuple[list[int], list[int], list[int]]]) -> Batch:
    """Rows of one length as tensors."""
    ids, labels, owner = torch.tensor(packed).unbind(1)
    length = ids.shape[1]
    index = torch.arange(length)
    labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], 1)
    same = owner[:, :, None] == owner[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    starts = torch.where(torch.nn.functional.pad(owner[:, 1:] != owner[:, :-1], (1, 0), value=True), index, 0)
    return Batch(ids, labels, index - starts.cummax(1).values, (same & causal)[:, None])
