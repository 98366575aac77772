"""What a single token stands for, as bytes.

Decoding one token by itself loses what matters for log-probabilities and streams: sentencepiece-like decoders drop a
leading space, and part of a character becomes U+FFFD. So the vocabulary's spelling is undone here, by the kind of
decoder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable Latin-1 stands for itself, other bytes for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


class TokenPieces:
    """Bytes of tokens, for byte-level and sentencepiece-like vocabularies; for others, text in the middle of a text.

    `table` holds the bytes of every token by id, if they say all: if joining those of a text's tokens gives its UTF-8,
    but for what the decoder drops in front of the first. It is None for other decoders.
    """

    def __init__(self, backend: tokenizers.Tokenizer, decode: Callable[[list[int]], str]) -> None:
        """`decode` is the backend's own, with special tokens."""
        self._backend = backend
        self._decode = decode
        self._added = {token_id: token.content for token_id, token in backend.get_added_tokens_decoder().items()}
        self._steps = _steps(backend)
        self._byte_level = "ByteLevel" in {step["type"] for step in self._steps}
        # Other characters in Latin-1 become one that is not.
        self._alphabet = dict.fromkeys(range(256), "\N{REPLACEMENT CHARACTER}") | {
            ord(character): chr(byte) for character, byte in byte_of_character().items()
        }
        self._cache: dict[int, bytes] = {}
        self.table: dict[int, bytes] | None = None
        if _are_undone(self._steps):
            vocabulary = backend.get_vocab(with_added_tokens=True)
            self.table = {token_id: self._spelled(token_id, token) for token, token_id in vocabulary.items()}

    def token_bytes(self, token_id: int) -> bytes:
        if self.table is not None:
            return self.table.get(token_id, b"")
        found = self._cache.get(token_id)
        if found is None:
            found = self._find(token_id)
            if found:
                self._cache[token_id] = found
        return found

    def first_bytes(self, token_id: int) -> bytes:
        """What the token stands for at the start of a text."""
        text = self._decode([token_id])
        return self.token_bytes(token_id) if "\N{REPLACEMENT CHARACTER}" in text else text.encode()

    def _find(self, token_id: int) -> bytes:
        if token_id < 0:
            return b""
        token = self._added.get(token_id)
        if token is not None:
            return token.encode()
        return b"" if self._backend.id_to_token(token_id) is None else self._within_text(token_id).encode()

    def _spelled(self, token_id: int, token: str) -> bytes:
        if not self._byte_level:
            return self._undo_steps(token)
        if token_id in self._added:
            return token.encode()
        try:
            return token.translate(self._alphabet).encode("latin-1")
        except UnicodeEncodeError:
            return token.encode()

    def _undo_steps(self, token: str) -> bytes:
        for step in self._steps:
            if step["type"] == "ByteFallback":
                match = _BYTE_TOKEN.fullmatch(token)
                if match:
                    return bytes([int(match[1], 16)])
            elif step["type"] == "Metaspace":
                token = token.replace(step["replacement"], " ")
            elif step["type"] == "Replace":
                token = token.replace(step["pattern"]["String"], step["content"])
        return token.encode()

    def _within_text(self, token_id: int) -> str:
        """What the token adds after a copy of itself."""
        once, twice = (self._decode([token_id] * times) for times in (1, 2))
        return twice[len(once) :] if twice.startswith(once) else once


def _are_undone(steps: list[dict[str, Any]]) -> bool:
    """Whether the decoder treats every token alike, but for spaces in front of the first."""
    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds:
        return kinds == ["ByteLevel"]
    fused = False
    for step in steps:
        kind = step["type"]
        if kind == "Replace" and ("String" not in step["pattern"] or fused):
            return False
        if kind == "Strip" and not (fused and step["start"] <= 1 and step["stop"] == 0):
            return False
        if kind not in ("ByteFallback", "Metaspace", "Replace", "Strip", "Fuse"):
            return False
        fused = fused or kind == "Fuse"
    return True


def _steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """The decoder's parts in order, as in tokenizer.json."""
    if backend.decoder is None:
        return [{"type": "none"}]
    state = json.loads(backend.decoder.__getstate__())
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    return steps
