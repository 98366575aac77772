"""Calls that a grammar makes are read back by the family's own parser, with arguments that match their schemas."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest
from grammars.walks import byte_vocabulary, text_of, walk

from core.errors import InvalidRequestError
from core.grammars import forms
from core.grammars.calls import CallGrammar, closed
from core.parsers.events import Arguments, CallStart, Text, merged
from core.parsers.families import TOOL_PARSERS, parser_class

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"}, "unit": {"enum": ["c", "f"], "type": "string"}, "days": {"type": "integer"},
        "exact": {"type": "boolean"}, "height": {"type": ["number", "null"]},
    },
    "required": ["city", "exact"],
    "additionalProperties": False,
}  # fmt: skip
NOW: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
NESTED = {
    "type": "object",
    "properties": {
        "of": {"type": "array", "items": {"$ref": "#/$defs/point"}, "maxItems": 3}, "note": {"type": "string"},
    },
    "required": ["of"],
    "$defs": {
        "point": {
            "type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "boolean"}}, "required": ["x"],
            "additionalProperties": False,
        }
    },
    "additionalProperties": False,
}  # fmt: skip


def tools_for(family: str) -> dict[str, Any]:
    flat = parser_class(family).shape.arguments == "gemma"
    return {"weather": WEATHER, "now": NOW} if flat else {"weather": WEATHER, "now": NOW, "draw": NESTED}


def calls_of(family: str, tools: dict[str, Any], text: str, special: dict[str, int]) -> tuple[list[Any], str]:
    parser = parser_class(family)(tools, special)
    events = merged([*parser.feed(text), *parser.finish()])
    calls: list[Any] = []
    for event in events:
        if isinstance(event, CallStart):
            calls.append([event.name, ""])
        elif isinstance(event, Arguments):
            calls[-1][1] += event.text
    return calls, "".join(event.text for event in events if isinstance(event, Text))


def check(calls: list[Any], tools: dict[str, Any]) -> None:
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), tools[name])


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("family", TOOL_PARSERS)
def test_required_calls_are_calls_and_nothing_else(family: str, control: bool) -> None:
    tools, parser = tools_for(family), parser_class(family)
    special = {text: 257 + number for number, text in enumerate(parser.markup)} if control else {}
    grammars, rng = byte_vocabulary(special), random.Random(3)
    seen = set()
    for parallel in (True, False):
        grammar = forms.compose(*CallGrammar(parser.shape, tools, special).required(parallel=parallel))
        grammars.check(grammar, "tools")
        for _ in range(4):
            tokens = walk(grammars, grammar, rng)
            if tokens is None:
                continue
            calls, text = calls_of(family, tools, text_of(grammars, tokens), special)
            assert calls and not text.strip(), text_of(grammars, tokens)
            assert parallel or len(calls) == 1
            check(calls, tools)
            seen.update(name for name, _ in calls)
    assert seen


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("family", TOOL_PARSERS)
def test_where_calls_are_offered_there_may_be_text_and_what_is_called_is_right(family: str, control: bool) -> None:
    tools, parser = tools_for(family), parser_class(family)
    special = {text: 257 + number for number, text in enumerate(parser.markup)} if control else {}
    grammars, rng = byte_vocabulary(special), random.Random(4)
    grammar = forms.compose(*CallGrammar(parser.shape, tools, special).offered(parser.openings, parallel=True))
    grammars.check(grammar, "tools")
    shape = parser.shape
    written = shape.first + shape.begin
    for start in ("", written):
        for _ in range(4):
            tokens = begun(grammars, special, grammar, start, rng)
            if tokens is not None:
                calls, _ = calls_of(family, tools, text_of(grammars, tokens), special)
                assert calls or not start, text_of(grammars, tokens)
                check(calls, tools)


def begun(grammars: Any, special: dict[str, int], grammar: str, start: str, rng: random.Random) -> list[int] | None:
    """A walk whose first tokens are those of `start`."""
    tokens: list[int] = []
    while start:
        word = next((text for text in special if start.startswith(text)), None)
        tokens += [special[word]] if word else list(start[0].encode())
        start = start[len(word) if word else 1 :]
    matcher = grammars.matcher(grammar)
    assert matcher.consume_tokens(tokens), matcher.get_error()

    class Ahead:
        vocabulary = grammars.vocabulary

        def matcher(self, text: str) -> Any:
            return matcher.deep_copy()

    rest = walk(Ahead(), grammar, rng)  # type: ignore[arg-type]
    return None if rest is None else tokens + rest


@pytest.mark.parametrize(
    ("family", "schema", "where"),
    [
        ("qwen3_coder", {"properties": {"a": {"type": "string", "pattern": "^a$"}}}, "/properties/a/pattern"),
        ("glm", {"properties": {}, "minProperties": 1}, "/minProperties"),
        ("function_gemma", {"properties": {"a": {"type": "array"}}}, "/properties/a"),
    ],
)
def test_what_a_family_cannot_write_is_named(family: str, schema: dict[str, Any], where: str) -> None:
    with pytest.raises(InvalidRequestError, match=where):
        CallGrammar(parser_class(family).shape, {"f": {"type": "object", **schema}}, {})


@pytest.mark.parametrize(
    "more",
    [{"minProperties": 2}, {"allOf": [{"properties": {"b": {}}}]}, {"$ref": "#/$defs/a"}, {"additionalProperties": {}}],
    ids=str,
)
def test_arguments_that_a_schema_may_have_elsewhere_are_not_taken_away(more: dict[str, Any]) -> None:
    schema = {"type": "object", "properties": {"a": {}}}
    assert closed(schema | more) == schema | more
    assert closed(schema) == schema | {"additionalProperties": False}
