"""Which family a model belongs to, and its parsers. A family's own file is imported when its first parser is made."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, get_args

from core.errors import InvalidRequestError

if TYPE_CHECKING:
    from core.parsers.calls import CallParser

AUTO, NONE = "auto", "none"
ToolParserName = Literal[
    "auto", "none", "hermes", "qwen3_coder", "llama3_json", "mistral", "mistral_named", "harmony", "deepseek_v3",
    "deepseek_v31", "deepseek_v32", "glm", "granite", "pythonic", "gemma", "function_gemma", "gemma4", "kimi_k2",
    "minimax_m2",
]  # fmt: skip
ReasoningParserName = Literal[
    "auto", "none", "think", "harmony", "mistral", "granite", "seed_oss", "kimi", "cohere", "gemma4"
]
HARMONY = "harmony"

_CLASSES = {
    "hermes": "hermes:HermesParser",
    "qwen3_coder": "qwen3_coder:Qwen3CoderParser",
    "llama3_json": "llama3:Llama3Parser",
    "mistral": "mistral:MistralParser",
    "mistral_named": "mistral:MistralNamedParser",
    "harmony": "harmony:HarmonyParser",
    "deepseek_v3": "deepseek:DeepSeekV3Parser",
    "deepseek_v31": "deepseek:DeepSeekV31Parser",
    "deepseek_v32": "deepseek_v32:DeepSeekV32Parser",
    "glm": "glm:GlmParser",
    "granite": "granite:GraniteParser",
    "pythonic": "pythonic:PythonicParser",
    "gemma": "gemma:GemmaParser",
    "function_gemma": "function_gemma:FunctionGemmaParser",
    "gemma4": "function_gemma:Gemma4Parser",
    "kimi_k2": "kimi:KimiK2Parser",
    "minimax_m2": "minimax:MiniMaxM2Parser",
}
TOOL_PARSERS = tuple(_CLASSES)
REASONING_PARSERS = get_args(ReasoningParserName)[2:]

_TOOL_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("harmony", ("<|channel|>", "<|message|>")),
    ("deepseek_v32", ("｜DSML｜",)),
    ("minimax_m2", ("<minimax:tool_call>",)),
    ("kimi_k2", ("<|tool_call_argument_begin|>",)),
    ("deepseek_v3", ("<｜tool▁sep｜>", "```json")),
    ("deepseek_v31", ("<｜tool▁sep｜>",)),
    ("mistral_named", ("[TOOL_CALLS]", "[ARGS]")),
    ("mistral", ("[TOOL_CALLS]",)),
    ("glm", ("<arg_key>",)),
    ("qwen3_coder", ("<function=",)),
    ("function_gemma", ("<start_function_call>",)),
    ("gemma4", ("<|tool_call>",)),
    ("gemma", ("```tool_code",)),
    ("granite", ("<|tool_call|>",)),
    ("hermes", ("<tool_call>",)),
    ("pythonic", ("<|tool_call_start|>",)),
    ("pythonic", ("func_name1(",)),
    ("llama3_json", ("<|python_tag|>",)),
    ("llama3_json", ('"name": function name',)),
    ("llama3_json", ("'\"parameters\": '",)),
    ("llama3_json", ('\\"parameters\\": ',)),
    ("pythonic", ("<|python_start|>",)),
)
"""What a template writes or explains, all of it, by the family that does; the first that is found counts."""
_TOKEN_SIGNS = (
    ("mistral", "[TOOL_CALLS]"), ("llama3_json", "<|python_tag|>"), ("pythonic", "<|python_start|>"),
)  # fmt: skip
"""Tokens that tell where a template says nothing of how calls are written."""


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """How a model writes calls and thoughts, by the names of parsers; None: it does neither, or nobody knows how.
    `call_tokens` and `thought_tokens` are those of its special tokens that parsers have to see, by their texts."""

    tool_parser: str | None = None
    reasoning_parser: str | None = None
    call_tokens: Mapping[str, int] = field(default_factory=dict)
    thought_tokens: Mapping[str, int] = field(default_factory=dict)


def recognise(
    template: str,
    special_tokens: Mapping[int, str],
    added_tokens: Collection[str] = (),
    *,
    tool_parser: str = AUTO,
    reasoning_parser: str = AUTO,
) -> OutputFormat:
    """The format of a model with this chat template and these tokens, where a setting does not name its parsers."""
    known = {*added_tokens, *special_tokens.values()}
    tools = _named(tool_parser, TOOL_PARSERS, "tool_parser") if tool_parser != AUTO else _tool_parser(template, known)
    if reasoning_parser != AUTO:
        reasoning = _named(reasoning_parser, REASONING_PARSERS, "reasoning_parser")
    else:
        reasoning = HARMONY if tools == HARMONY else _reasoning_parser(template, known)
    ids = {text: token_id for token_id, text in special_tokens.items()}
    return OutputFormat(
        tools,
        reasoning,
        {text: ids[text] for text in (parser_class(tools).markup if tools else ()) if text in ids},
        {text: token_id for text, token_id in ids.items() if any(text in mark for mark in _thought_markup(reasoning))},
    )


def _named(name: str, names: Collection[str], param: str) -> str | None:
    if name == NONE:
        return None
    if name not in names:
        raise InvalidRequestError(f"{param} must be one of {AUTO}, {NONE}, {', '.join(names)}.", param=param)
    return name


def _tool_parser(template: str, tokens: Collection[str]) -> str | None:
    """The family of a template that takes tools."""
    if not re.search(r"\btools\b", template):
        return None
    for name, signs in _TOOL_SIGNS:
        if all(sign in template for sign in signs):
            return name
    return next((name for name, token in _TOKEN_SIGNS if token in tokens), None)


def _reasoning_parser(template: str, tokens: Collection[str]) -> str | None:
    from core.parsers.reasoning import TAGS

    for name, tags in TAGS.items():
        if tags.open.strip() in template or tags.close in template:
            return name
        if tags.open in tokens and tags.close in tokens:
            return name
    return None


def _thought_markup(reasoning_parser: str | None) -> tuple[str, ...]:
    if reasoning_parser is None:
        return ()
    if reasoning_parser == HARMONY:
        return parser_class(HARMONY).markup
    from core.parsers.reasoning import TAGS

    return TAGS[reasoning_parser].open, TAGS[reasoning_parser].close


def parser_class(name: str) -> type[CallParser]:
    """The class of a family's parser, with the shape of its calls."""
    module, _, attribute = _CLASSES[name].partition(":")
    found: Any = getattr(import_module(f"core.parsers.{module}"), attribute)
    return found  # type: ignore[no-any-return]
