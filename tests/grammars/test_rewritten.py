"""Schemas in the words that llguidance has: they allow nothing more, and what they mean is kept to."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest
from grammars.walks import byte_vocabulary, text_of, walk

from core.errors import InvalidRequestError
from core.grammars import forms
from core.grammars.compiler import GrammarError
from core.grammars.schemas import rewritten

INTEGER, BOOLEAN = {"type": "integer"}, {"type": "boolean"}
AB = {"a": BOOLEAN, "b": BOOLEAN, "c": BOOLEAN}


def obj(**more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": AB, "additionalProperties": False, **more}


@pytest.mark.parametrize(
    ("schema", "found"),
    [
        ({"title": "T", "description": "d", "type": "string", "default": ""}, {"type": "string"}),
        ({"properties": {"title": {"title": "T", "type": "string"}}}, {"properties": {"title": {"type": "string"}}}),
        ({"enum": [{"title": "T", "format": "x"}]}, {"enum": [{"title": "T", "format": "x"}]}),
        ({"type": "string", "format": "color"}, {"type": "string"}),
        ({"type": "string", "format": "regex"}, {"type": "string", "format": "regex"}),
        ({"uniqueItems": False, "if": {}, "dependencies": {}, "not": False}, {}),
        ({"then": {"const": 1}, "maxItems": 1, "uniqueItems": True}, {"maxItems": 1}),
        ({"items": {"not": {}}}, {"items": False}),
        ({"oneOf": [INTEGER, BOOLEAN]}, {"anyOf": [INTEGER, BOOLEAN]}),
        ({"oneOf": [{"const": 1}, {"enum": [2, "a"]}]}, {"anyOf": [{"const": 1}, {"enum": [2, "a"]}]}),
        ({"minimum": 3, "exclusiveMinimum": True}, {"exclusiveMinimum": 3}),
        ({"minimum": 3, "exclusiveMinimum": False}, {"minimum": 3}),
        ({"exclusiveMinimum": 3, "maximum": 9}, {"exclusiveMinimum": 3, "maximum": 9}),
    ],
)
def test_in_other_words(schema: dict[str, Any], found: dict[str, Any]) -> None:
    assert rewritten(schema) == found


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": [INTEGER, {"type": "number"}]}, {"oneOf": [{"const": 1}, {"const": 1.0}]},
        {"type": "string", "oneOf": [{"maxLength": 3}, {"minLength": 2}]}, {"not": {"type": "string"}},
        {"oneOf": [{"type": "object", "required": ["a"]}, {"type": "object", "required": ["a"]}]},
        {"type": "object", "required": ["a"], "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
        {"definitions": {"a": {"$ref": "#/definitions/a"}}, "oneOf": [INTEGER, {"$ref": "#/definitions/a"}]},
    ],
)  # fmt: skip
def test_what_is_not_known_to_be_apart_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(GrammarError, match=r"oneOf|not"):
        byte_vocabulary().matcher(forms.compose(forms.json_schema(schema)))


def test_references_through_what_changes_are_left_alone() -> None:
    schema = {"properties": {"a": {"oneOf": [INTEGER, BOOLEAN]}, "b": {"$ref": "#/properties/a/oneOf/0"}}}
    assert rewritten(schema) == schema


def test_what_stands_beside_a_reference_does_not_tell_branches_apart() -> None:
    """Before draft 2019-09 it did not count."""
    schema = {"$defs": {"any": {}}, "oneOf": [INTEGER, {"$ref": "#/$defs/any", "type": "string"}]}
    assert rewritten(schema) == schema


KEPT: list[dict[str, Any]] = [
    obj(oneOf=[{"required": ["a"]}, {"required": ["b"]}]), obj(oneOf=[{"required": [name]} for name in AB]),
    {"properties": AB, "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
    obj(dependencies={"a": ["b"]}), obj(dependencies={"a": {"required": ["b"], "properties": {"b": {"const": True}}}}),
    obj(dependencies={"a": ["b"], "b": ["a"]}), obj(dependentRequired={"a": ["b", "c"]}),
    obj(dependencies={"a": False}),
    obj(dependentSchemas={"a": {"required": ["c"]}}),
    obj(**{"not": {"required": ["a"]}}), obj(**{"not": {"required": ["a", "b"]}}),
    obj(**{"not": {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}}),
    obj(**{"not": {"allOf": [{"required": ["a"]}, {"required": ["b"]}]}}),
    {"type": ["object", "null"], "properties": AB, "not": {"required": ["a"]}},
    obj(minProperties=1), obj(minProperties=1, maxProperties=1),
    {"type": "object", "properties": AB, "minProperties": 1},
    {"type": "object", "properties": AB, "minProperties": 1, "required": ["a"]},
    {"oneOf": [obj(required=["a"]), {"type": "object", "properties": {"x": INTEGER}, "required": ["x"]}]},
    {"oneOf": [{"properties": {"k": {"const": "a"}}, "required": ["k"], "type": "object"},
               {"properties": {"k": {"const": "b"}, "v": INTEGER}, "required": ["k", "v"], "type": "object"}]},
    {"definitions": {"n": {"type": "null"}, "t": {"$ref": "#/definitions/n"}},
     "oneOf": [INTEGER, {"$ref": "#/definitions/t"}]},
    {"definitions": {"n": {"type": "object", "properties": {"m": {"$ref": "#/definitions/n", "title": "More"}},
                           "additionalProperties": False}}, "$ref": "#/definitions/n"},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5},
    {"type": "number", "minimum": -1.5, "exclusiveMaximum": -1},
    {"type": "number", "minimum": 1, "exclusiveMinimum": True, "maximum": 1.5},
    {"type": "string", "format": "json-pointer", "maxLength": 9},
    {"type": "string", "format": "uri-reference", "maxLength": 9},
]  # fmt: skip


@pytest.mark.parametrize("schema", KEPT, ids=[json.dumps(schema)[:60] for schema in KEPT])
def test_what_is_said_otherwise_is_kept_to(schema: dict[str, Any]) -> None:
    """As the validator reads the schema itself, which is not asked about what became of it."""
    grammars, rng, seen = byte_vocabulary(), random.Random(11), set()
    older = "dependencies" in schema or "definitions" in schema
    kind = jsonschema.Draft4Validator if schema.get("exclusiveMinimum") is True else jsonschema.Draft7Validator
    validator = (kind if older or kind is jsonschema.Draft4Validator else jsonschema.Draft202012Validator)(schema)
    for _ in range(25):
        tokens = walk(grammars, forms.compose(forms.json_schema(schema, space="")), rng, limit=150)
        if tokens is not None:
            text = text_of(grammars, tokens)
            validator.validate(json.loads(text))
            seen.add(text)
    assert len(seen) > 2, "more than one answer is left"


@pytest.mark.parametrize(
    ("schema", "answers"),
    [
        (obj(oneOf=[{"required": ["a"]}, {"required": ["b"]}]), ['{"a":true}', '{"b":true,"c":false}']),
        (obj(dependencies={"a": ["b"]}), ["{}", '{"b":true}', '{"a":true,"b":true}']),
        (obj(**{"not": {"required": ["a", "b"]}}), ["{}", '{"a":true}', '{"b":false}']),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, ["0.5", "0.001", "0.25"]),
        ({"type": "string", "format": "uri-reference"}, ['"/a/b?c=d#e"', '"a:b"', '""', '"../x%20y"'][::2]),
    ],
)
def test_what_was_allowed_still_is(schema: dict[str, Any], answers: list[str]) -> None:
    for answer in answers:
        matcher = byte_vocabulary().matcher(forms.compose(forms.json_schema(schema, space="")))
        assert matcher.consume_tokens(list(answer.encode())) and matcher.is_accepting(), answer


def test_what_only_describes_costs_no_room() -> None:
    """Published schemas of 200 KiB are mostly descriptions."""
    long = {"description": "d" * 100_000, **obj()}
    assert len(forms.compose(forms.json_schema({"type": "array", "items": {"anyOf": [long, long]}}))) < 2000


def test_an_exclusive_bound_may_be_a_word_of_draft_4() -> None:
    from core.api.openai.tool_schemas import check_schema

    check_schema({"minimum": 1, "exclusiveMinimum": True}, "x", of_object=False)
    with pytest.raises(InvalidRequestError, match="exclusiveMinimum"):
        check_schema({"exclusiveMinimum": "1"}, "x", of_object=False)
