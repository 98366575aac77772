# ruff: noqa: E501  a schema a line reads best
"""Small JSON schemas, most with one keyword each, as in JSON-Schema-Test-Suite, and what clients send by hand."""

from __future__ import annotations

from typing import Any


def obj(required: str | None = None, /, **properties: Any) -> dict[str, Any]:
    names = list(properties) if required is None else required.split()
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


STRING, INTEGER, NUMBER, BOOLEAN, NULL = ({"type": kind} for kind in ("string", "integer", "number", "boolean", "null"))
PERSON = obj(name={"type": "string", "maxLength": 12}, age={"type": "integer", "minimum": 0, "maximum": 150})
SCHEMAS: list[Any] = [
    # scalars
    STRING, INTEGER, NUMBER, BOOLEAN, NULL, {"const": "a"}, {"const": {"a": [1, None, True]}}, {"enum": ["a", 1, None]},
    {"type": ["string", "null"]}, {"type": "string", "minLength": 2, "maxLength": 5}, {"type": "string", "minLength": 3},
    {"type": "string", "pattern": "^[a-z]{2}-[0-9]+$"}, {"type": "string", "pattern": "b"},
    {"type": "string", "format": "date"}, {"type": "string", "format": "date-time"}, {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"}, {"type": "string", "format": "time"},
    {"type": "integer", "minimum": -5, "maximum": 17}, {"type": "integer", "exclusiveMinimum": 0},
    {"type": "number", "minimum": 0.5, "maximum": 2.25}, {"type": "integer", "multipleOf": 5},
    {"type": "number", "exclusiveMaximum": 0}, {"enum": ["naïve", "日本", "a\"b\\c", "x\ny"]}, {"type": "string", "enum": [""]},
    # arrays
    {"type": "array"}, {"type": "array", "items": INTEGER}, {"type": "array", "items": STRING, "minItems": 1, "maxItems": 3},
    {"type": "array", "items": {"type": "array", "items": BOOLEAN, "maxItems": 2}, "maxItems": 3},
    {"type": "array", "prefixItems": [STRING, INTEGER], "items": False, "minItems": 2},
    {"type": "array", "prefixItems": [BOOLEAN], "items": NULL}, {"type": "array", "items": PERSON, "maxItems": 2},
    {"type": "array", "maxItems": 0}, {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 3},
    # objects
    {"type": "object"}, obj(), PERSON, obj(a=STRING, b=INTEGER), obj("a", a=STRING, b=INTEGER), obj("", a=STRING, b=NUMBER),
    {"type": "object", "additionalProperties": INTEGER}, {"type": "object", "properties": {"a": INTEGER}},
    {"type": "object", "patternProperties": {"^x_": INTEGER}, "additionalProperties": False},
    {"type": "object", "properties": {"a": INTEGER}, "required": ["b"], "additionalProperties": STRING},
    {"type": "object", "minProperties": 1, "additionalProperties": BOOLEAN}, obj(outer=obj(inner=obj(deep=BOOLEAN))),
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {}}, "required": ["a"]},
    {"type": "object", "additionalProperties": {"type": "array", "items": NUMBER, "maxItems": 2}, "maxProperties": 2},
    {"type": "object", "properties": {"a": INTEGER, "b": INTEGER}, "dependentRequired": {"a": ["b"]}},
    {"type": "object", "properties": {"a": INTEGER, "b": INTEGER}, "not": {"required": ["a", "b"]}},
    # combinations
    {"anyOf": [STRING, INTEGER]}, {"anyOf": [PERSON, NULL]}, {"oneOf": [STRING, {"type": "array", "items": INTEGER}]},
    {"oneOf": [obj(kind={"const": "a"}, x=INTEGER), obj(kind={"const": "b"}, y=STRING)]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
    {"allOf": [{"properties": {"a": INTEGER}, "required": ["a"]}, {"properties": {"b": STRING}, "required": ["b"]}],
     "type": "object"},
    {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "object", "additionalProperties": False}]},
    {"type": ["integer", "array", "null"], "items": BOOLEAN, "maxItems": 2},
    # references
    {"$defs": {"p": PERSON}, "$ref": "#/$defs/p"}, {"definitions": {"n": NUMBER}, **obj(x={"$ref": "#/definitions/n"})},
    {"$defs": {"t": obj("v", v=INTEGER, next={"anyOf": [{"$ref": "#/$defs/t"}, NULL]})}, "$ref": "#/$defs/t"},
    {"$defs": {"e": {"anyOf": [INTEGER, {"type": "array", "items": {"$ref": "#/$defs/e"}, "maxItems": 2}]}},
     "$ref": "#/$defs/e"},
    obj("value", value=BOOLEAN, children={"type": "array", "items": {"$ref": "#"}, "maxItems": 2}),
    # what clients send
    {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Event", "description": "An event", **obj(
        name={"title": "Name", "type": "string", "maxLength": 10}, date={"type": "string", "format": "date"},
        participants={"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 2, "default": []})},
    obj(steps={"type": "array", "items": obj(explanation={"type": "string", "maxLength": 9}, output={"type": "string",
        "maxLength": 9}), "maxItems": 2}, final_answer={"type": "string", "maxLength": 9}),
    obj(action={"enum": ["search", "answer"]}, arguments={"anyOf": [obj(query={"type": "string", "maxLength": 9}),
        obj(text={"type": "string", "maxLength": 9})]}),
    obj(location={"type": "string", "examples": ["Oslo"]}, unit={"type": "string", "enum": ["c", "f"], "default": "c"}),
    obj(score={"type": "number", "minimum": 0, "maximum": 1}, labels={"type": "array", "items": {"enum": ["x", "y"]}}),
    obj("host", host={"type": "string", "format": "hostname"}, port={"type": "integer", "minimum": 1, "maximum": 65535},
        tls=BOOLEAN, paths={"type": "object", "additionalProperties": {"type": "string", "maxLength": 4}}),
    obj(**{f"field_{number}": {"type": ["string", "null"], "maxLength": 4} for number in range(20)}),
]  # fmt: skip
