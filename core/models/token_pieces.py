"""What a single token stands for, as bytes.

Decoding one token by itself loses what matters for log-probabilities: sentencepiece-like decoders drop a leading space,
and part of a character becomes U+FFFD. So the vocabulary's spelling is undone here, by the kind of decoder.
"""

from __future__ import annotations

import json
import re
from typing import Any

import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable Latin-1 stands for itself, other bytes for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


class TokenPieces:
    """Bytes of tokens, for byte-level and sentencepiece-like vocabularies; for others, text in the middle of a text."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._added = {token_id: token.content for token_id, token in backend.get_added_tokens_decoder().items()}
        self._steps = _steps(backend)
        kinds = {step["type"] for step in self._steps}
        self._byte_level = "ByteLevel" in kinds
        self._spelled = kinds <= {"ByteLevel", "ByteFallback", "Metaspace", "Replace", "Strip", "Fuse"}
        self._alphabet = byte_of_character()
        self._cache: dict[int, bytes] = {}

    def token_bytes(self, token_id: int) -> bytes:
        found = self._cache.get(token_id)
        if found is None:
            found = self._find(token_id)
            if found:
                self._cache[token_id] = found
        return found

    def _find(self, token_id: int) -> bytes:
        if token_id < 0:
            return b""
        token = self._added.get(token_id)
        if token is not None:
            return token.encode()
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if not self._spelled:
            return self._within_text(token_id).encode()
        if self._byte_level:
            if all(character in self._alphabet for character in token):
                return bytes(self._alphabet[character] for character in token)
            return token.encode()
        return self._undo_steps(token)

    def _undo_steps(self, token: str) -> bytes:
        for step in self._steps:
            if step["type"] == "ByteFallback":
                match = _BYTE_TOKEN.fullmatch(token)
                if match:
                    return bytes([int(match[1], 16)])
            elif step["type"] == "Metaspace":
                token = token.replace(step["replacement"], " ")
            elif step["type"] == "Replace":
                pattern = step["pattern"].get("String")
                token = token.replace(pattern, step["content"]) if pattern else token
        return token.encode()

    def _within_text(self, token_id: int) -> str:
        """What the token adds after a copy of itself."""
        once, twice = self._backend.decode([token_id]), self._backend.decode([token_id, token_id])
        return twice[len(once) :] if twice.startswith(once) else once


def _steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """The decoder's parts in order, as in tokenizer.json."""
    if backend.decoder is None:
        return [{"type": "none"}]
    state = json.loads(backend.decoder.__getstate__())
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    return steps
