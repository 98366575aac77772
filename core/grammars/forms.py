"""What clients ask for, as grammars that llguidance reads. One is JSON: named parts, the first of which counts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import llguidance
from llguidance.gbnf_to_lark import gbnf_to_lark

from core.grammars.schemas import rewritten

SPACE = r"(\n[ \t]{0,16}| )?"
"""Between the parts of JSON: nothing, a space, or a new line and its indentation. Were there no bound, a small model
could go on with spaces for ever."""
OPTIONS = "x-guidance"
"""The key of a schema under which llguidance looks for options."""
JSON_OBJECT: Mapping[str, Any] = {"type": "object"}

Part = dict[str, Any]
"""`lark_grammar` or `json_schema`; other parts refer to it by its `name`."""


def json_schema(schema: Mapping[str, Any] | bool, *, space: str = SPACE, lenient: bool = False) -> Part:
    """JSON that a schema allows. `lenient`: keywords that cannot be kept to are left out of account."""
    return {"json_schema": with_options(schema, space=space, lenient=lenient)}


def with_options(
    schema: Mapping[str, Any] | bool, *, space: str = SPACE, lenient: bool = False
) -> dict[str, Any]:  # fmt: skip
    """A schema with all options set, so that a client's own do not count."""
    given = rewritten(schema) if isinstance(schema, Mapping) else ({} if schema else {"not": {}})
    given.pop("$schema", None)  # names the draft, and would be looked up
    options = {
        "item_separator": ",", "key_separator": ":", "whitespace_flexible": True, "whitespace_pattern": space,
        "coerce_one_of": lenient, "lenient": lenient,
        "json_allowed_escapes": 'nrtbfu"\\',
    }  # fmt: skip
    return {**given, OPTIONS: options}


def regex(pattern: str) -> Part:
    """All of the answer matches `pattern`, in the syntax of Rust's regular expressions."""
    return {"lark_grammar": f"start: /{llguidance.regex_to_lark(pattern, 'd')}/"}


def choice(choices: Sequence[str]) -> Part:
    """One of these texts."""
    return {"lark_grammar": "start: " + " | ".join(map(literal, choices))}


def rules(text: str) -> Part:
    """A grammar in Lark's syntax, as llguidance has it, or in that of llama.cpp (`root ::= ...`).

    Raises `ValueError` for one of the latter that cannot be read.
    """
    return {"lark_grammar": gbnf_to_lark(text) if "::=" in text else text}


def literal(text: str) -> str:
    """A text, in Lark's syntax."""
    return json.dumps(text, ensure_ascii=False)


def compose(*parts: Part) -> str:
    """A grammar of its parts. All but the first have names."""
    return json.dumps({"grammars": list(parts)}, ensure_ascii=False, separators=(",", ":"))


def named(name: str, part: Part) -> Part:
    return {"name": name, **part}


def after_thoughts(is_open: bool, opening: str, closing: str, answer: Part) -> list[Part]:
    """The same behind thoughts, which end with `closing` and, unless they are open already, begin with `opening` or are
    left out. Both are given in Lark's syntax (see `mark`)."""
    thoughts = f"thoughts: THOUGHT {closing}" if closing.startswith("<") else f"thoughts[suffix={closing}]: THOUGHT"
    begin = "thoughts" if is_open else f"({opening} thoughts)?"
    text = f"start: {begin} GAP @answer\n{thoughts}\nTHOUGHT: /(.|\\n)*/\nGAP: /\\n{{0,2}}/\n"
    return [{"lark_grammar": text}, named("answer", answer)]


def mark(text: str, special: Mapping[str, int]) -> str:
    """Markup in Lark's syntax: texts of `special` tokens are those tokens, by their ids; all else is what it spells."""
    found: list[str] = []
    rest = text
    while rest:
        at, word = min(
            ((index, word) for word in special if (index := rest.find(word)) >= 0),
            key=lambda item: (item[0], -len(item[1])), default=(len(rest), ""),
        )  # fmt: skip
        if at:
            found.append(literal(rest[:at]))
        if word:
            found.append(f"<[{special[word]}]>")
        rest = rest[at + len(word) :]
    return " ".join(found)
