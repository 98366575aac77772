"""Answers made at random of what masks allow, as a model without wits would give them."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np

from core.grammars.compiler import Grammars
from core.grammars.matching import GrammarState, MaskMaker, MaskOrder
from core.grammars.vocabulary import Vocabulary

END = 256


def byte_vocabulary(special: Mapping[str, int] | None = None) -> Grammars:
    """Every byte is a token; 256 ends an answer, `special` texts are control tokens from 257 on."""
    table = {byte: bytes([byte]) for byte in range(256)} | {END: b"<|end of answer|>"}
    table |= {token_id: text.encode() for text, token_id in (special or {}).items()}
    return Grammars(lambda: Vocabulary.of(table, max(table) + 1, (special or {}).values(), [END]))


def allowed(maker: MaskMaker, state: GrammarState, fresh: list[int], held: tuple[int, ...] = ()) -> list[int]:
    """Tokens that may come after `fresh`. Raises `AssertionError` with what the maker says if there is no mask."""
    (mask,) = maker.begin([MaskOrder(0, state, fresh, held)]).result().values()
    assert not isinstance(mask, str), mask
    return np.nonzero(np.unpackbits(mask, bitorder="little"))[0].tolist()


def walk(grammars: Grammars, grammar: str, rng: random.Random, limit: int = 1500) -> list[int] | None:
    """Tokens of an answer, without the one that ends it; None if it came to no end. It gets shorter of breath as it
    goes: what closes something is ever likelier."""
    vocabulary = grammars.vocabulary
    maker, state, tokens, fresh = MaskMaker(grammars, len(vocabulary.tokens)), GrammarState(grammar), [], []
    try:
        for step in range(limit):
            choices = allowed(maker, state, fresh)
            if vocabulary.ends[0] in choices and rng.random() < 0.3 + step / limit:
                return tokens
            others = [token for token in choices if token not in vocabulary.ends]
            closing = [
                token for token in others if vocabulary.tokens[token][:1] in (b'"', b"}", b"]", b"<", b",", b":")
            ]
            if not others:
                return tokens
            fresh = [rng.choice(closing if closing and rng.random() < 0.5 + step / limit else others)]
            tokens += fresh
        return None
    finally:
        maker.close()


def text_of(grammars: Grammars, tokens: list[int]) -> str:
    return b"".join(grammars.vocabulary.tokens[token] for token in tokens).decode()
