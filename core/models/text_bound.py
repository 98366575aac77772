"""How much text a number of tokens can stand for at most, by what a tokenizer is made of.

Where no byte of a text can vanish, every token stands for no more bytes than its own spelling has. Normalizers that
make text shorter are reckoned with; for tokenizers that drop text, or take any long word as one unknown token, there is
no bound. All of it errs towards more text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import tokenizers

from core.models.token_pieces import byte_of_character

COMPOSED = 12.0
"""Bytes before Unicode normalization for a byte after it: 4 (mathematical letters) times 3 (Hangul)."""
LOWERCASED = 3.0
"""The Kelvin sign and its `k`."""
_HARMLESS = frozenset({"ByteLevel", "Prepend", "Metaspace", "Digits", "UnicodeScripts", "FixedLength"})
_COMPOSING = frozenset({"NFC", "NFD", "NFKC", "NFKD"})
_DROPS_SPACE = frozenset({"Strip", "Whitespace", "WhitespaceSplit", "BertPreTokenizer"})


class _Unbounded(Exception):
    """Text may vanish."""


@dataclass(frozen=True, slots=True)
class TextBound:
    """A token stands for at most `bytes_per_token` bytes of UTF-8, white space not counted if it may be `dropped`."""

    bytes_per_token: float
    drops_space: bool = False


def text_bound(backend: tokenizers.Tokenizer) -> TextBound | None:
    """None: there is no bound."""
    parts = [*_parts(backend.normalizer), *_parts(backend.pre_tokenizer)]
    vocab = backend.get_vocab(with_added_tokens=True)
    if not _knows_all_bytes(backend, parts, vocab):
        return None
    shrink, drops_space = 1.0, False
    try:
        for part in parts:
            shrink *= _shrink(part)
            drops_space |= part["type"] in _DROPS_SPACE
    except _Unbounded:
        return None
    added = backend.get_added_tokens_decoder().values()
    drops_space |= any(token.lstrip or token.rstrip for token in added)
    return TextBound(max(len(token.encode()) for token in vocab) * shrink, drops_space)


def _parts(component: Any) -> list[dict[str, Any]]:
    """A normalizer's or pre-tokenizer's parts in order, as in tokenizer.json."""
    if component is None:
        return []
    found, todo = [], [json.loads(component.__getstate__())]
    while todo:
        state = todo.pop(0)
        if state["type"] == "Sequence":
            todo = [*state.get("normalizers", ()), *state.get("pretokenizers", ()), *todo]
        else:
            found.append(state)
    return found


def _knows_all_bytes(backend: tokenizers.Tokenizer, parts: list[dict[str, Any]], vocab: dict[str, int]) -> bool:
    """Whether any text is spelled in tokens, down to single bytes."""
    model = backend.model
    if isinstance(model, tokenizers.models.BPE) and any(part["type"] == "ByteLevel" for part in parts):
        return all(character in vocab for character in byte_of_character())
    if isinstance(model, tokenizers.models.BPE):
        falls_back = model.byte_fallback
    else:
        falls_back = isinstance(model, tokenizers.models.Unigram) and json.loads(model.__getstate__())["byte_fallback"]
    if falls_back:
        return all(f"<0x{byte:02X}>" in vocab for byte in range(256))
    return False


def _shrink(part: dict[str, Any]) -> float:
    """How many times shorter a part makes a text at most."""
    kind = part["type"]
    if kind in _HARMLESS or kind in _DROPS_SPACE:
        return 1.0
    if kind in _COMPOSING:
        return COMPOSED
    if kind == "Lowercase":
        return LOWERCASED
    if kind in ("Split", "Punctuation") and part["behavior"] != "Removed":
        return 1.0
    if kind == "Replace" and part["content"] and "String" in part["pattern"]:
        return max(1.0, len(part["pattern"]["String"].encode()) / len(part["content"].encode()))
    raise _Unbounded
