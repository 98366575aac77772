"""A tokenizer's tokens as bytes, which is all that a grammar has to know of it; and as nodes are told them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Annotated

import llguidance
import msgspec
import numpy as np

MAX_TOKENS = 1 << 20
MAX_VOCABULARY_BYTES = 14 << 20
"""Of all tokens together; a message has 16 MiB."""


class Vocabulary(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True, eq=False):
    """`words` are the tokens' bytes one after the other, `lengths` how many each has, as little-endian uint16; a token
    without bytes is never chosen. `special` are control tokens, `ends` those that end an answer."""

    words: Annotated[bytes, msgspec.Meta(max_length=MAX_VOCABULARY_BYTES)]
    lengths: Annotated[bytes, msgspec.Meta(max_length=2 * MAX_TOKENS)]
    special: Annotated[tuple[int, ...], msgspec.Meta(max_length=MAX_TOKENS)]
    ends: Annotated[tuple[int, ...], msgspec.Meta(min_length=1, max_length=1024)]

    @classmethod
    def of(cls, table: Mapping[int, bytes], size: int, special: Iterable[int], ends: Sequence[int]) -> Vocabulary:
        """`table` has the bytes of tokens `0 .. size - 1`."""
        words = [table.get(token_id, b"")[:0xFFFF] for token_id in range(size)]
        lengths = np.array([len(word) for word in words], dtype="<u2").tobytes()
        inside = tuple(token_id for token_id in ends if 0 <= token_id < size)
        return cls(b"".join(words), lengths, tuple(sorted({*special, *inside})), inside)

    @cached_property
    def tokens(self) -> list[bytes]:
        """The bytes of each token. Raises `ValueError` if the parts do not fit each other."""
        bounds = np.cumsum(np.frombuffer(self.lengths, dtype="<u2"), dtype=np.int64).tolist()
        ids = (*self.special, *self.ends)
        if (bounds[-1] if bounds else 0) != len(self.words) or not all(0 <= each < len(bounds) for each in ids):
            raise ValueError("the parts of a vocabulary do not fit each other")
        return [self.words[start:end] for start, end in zip([0, *bounds], bounds, strict=False)]

    def build(self) -> llguidance.LLTokenizer:
        """What llguidance makes of it: a second of work for the largest."""
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Greedy(self)), eos_token=list(self.ends))


class _Greedy:
    """What llguidance asks of a tokenizer. Text that a grammar leaves no choice about is split into the longest tokens
    that fit: nodes have the tokens of a model, not its tokenizer, and every place has to split alike."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = vocabulary.tokens
        self.eos_token_id = vocabulary.ends[0]
        self.special_token_ids = list(vocabulary.special)
        hidden = set(vocabulary.special)
        self._ids = {word: token_id for token_id, word in enumerate(self.tokens) if word and token_id not in hidden}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: bytes | str) -> list[int]:
        data, at, found = text.encode() if isinstance(text, str) else text, 0, []
        while at < len(data):
            for size in range(min(self._longest, len(data) - at), 0, -1):
                token_id = self._ids.get(data[at : at + size])
                if token_id is not None:
                    found.append(token_id)
                    at += size
                    break
            else:
                break  # a byte without a token; the grammar cannot be followed there, and its mask says so
        return found
