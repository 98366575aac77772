"""Prompts for what is missing between two texts, in the tokens that the model has for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from core.api.sampling import encode_text
from core.errors import UnsupportedModelError

if TYPE_CHECKING:
    from core.engine.submission import LoadedModel


class GapTokens(NamedTuple):
    """Before the text before the gap, before the text after it, and before what fills it."""

    prefix: str
    suffix: str
    middle: str


FAMILIES = (
    GapTokens("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma, Granite
    GapTokens("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, SantaCoder
    GapTokens("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    GapTokens("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek
    GapTokens("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
)


def infill_prompt(prefix: str, suffix: str, begun: str, model: LoadedModel) -> list[int]:
    """Token ids of a prompt whose answer belongs between `prefix` and `suffix`, after `begun`.

    Raises `UnsupportedModelError` for a model that has no tokens for it.
    """
    known = model.tokenizer.added_tokens
    family = next((family for family in FAMILIES if all(token in known for token in family)), None)
    if family is None:
        raise UnsupportedModelError(f"{model.name} has no tokens for filling a gap (<|fim_prefix|> and the like).")
    bos = encode_text(prefix, model, add_special_tokens=True, param="input_prefix")
    plain = encode_text(prefix, model, add_special_tokens=False, param="input_prefix")
    first = bos[: len(bos) - len(plain)] if bos[len(bos) - len(plain) :] == plain else []
    marks = [model.tokenizer.encode(token, add_special_tokens=False) for token in family]
    after = encode_text(suffix, model, add_special_tokens=False, param="input_suffix")
    gap = encode_text(begun, model, add_special_tokens=False, param="prompt")
    return [*first, *marks[0], *plain, *marks[1], *after, *marks[2], *gap]
