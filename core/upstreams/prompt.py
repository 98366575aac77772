"""What a router has to know of a prompt: how long it is, and how it begins. In text, since tokens of other servers'
models are not known here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import xxhash

CHARACTERS_PER_TOKEN = 4
"""About that of English text and common tokenizers."""
BLOCK_CHARACTERS = 128
BLOCK_TOKENS = BLOCK_CHARACTERS // CHARACTERS_PER_TOKEN
MAX_BLOCKS = 4096
"""Of one prompt, half a million characters; what is beyond does not matter for the choice."""
EXPECTED_FIELDS = ("max_completion_tokens", "max_tokens")


@dataclass(frozen=True, slots=True)
class Prompt:
    """`hashes` are chained, one for each full block of `BLOCK_CHARACTERS`; `output_tokens` is the client's limit, if it
    gave one."""

    tokens: int
    hashes: tuple[int, ...] = ()
    output_tokens: int | None = None


def read_prompt(body: Mapping[str, Any]) -> Prompt:
    """Of a chat, a completion or an embedding. Whatever its fields hold, nothing is raised."""
    hashes: list[int] = []
    rest, total, digest = "", 0, 0
    for text in _texts(body):
        total += len(text)
        rest += text
        while len(rest) >= BLOCK_CHARACTERS and len(hashes) < MAX_BLOCKS:
            block, rest = rest[:BLOCK_CHARACTERS], rest[BLOCK_CHARACTERS:]
            digest = xxhash.xxh3_64_intdigest(block.encode("utf-8", "surrogatepass"), seed=digest)
            hashes.append(digest)
        if len(hashes) >= MAX_BLOCKS:
            rest = ""
    limit = next((body[name] for name in EXPECTED_FIELDS if type(body.get(name)) is int), None)
    return Prompt(max(1, total // CHARACTERS_PER_TOKEN), tuple(hashes), max(1, limit) if limit is not None else None)


def _texts(body: Mapping[str, Any]) -> Iterator[str]:
    """What the prompt is made of, in its order: tools come first, as templates put them."""
    if body.get("tools"):
        yield json.dumps(body["tools"])
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict):
            yield f"\n{message.get('role')}\n"
            content = message.get("content")
            yield content if isinstance(content, str) else json.dumps(content)
    for name in ("prompt", "input"):
        value = body.get(name)
        if value is not None:
            yield value if isinstance(value, str) else json.dumps(value)
