"""500 JSON schemas in the shapes of published suites, the same ones everywhere. Nothing of these suites is copied.

The families, and how often they come, follow JSONSchemaBench (https://arxiv.org/abs/2501.10868): parameters of
functions, events, configuration of ever harder kinds, resources of Kubernetes and of other APIs; beside these, what
Pydantic and Zod write for clients, and one keyword at a time, as in JSON-Schema-Test-Suite. They have 13 bytes to
110 KiB. One in fifty has a keyword that grammars cannot keep to, as real ones have.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jsonschema

Schema = dict[str, Any]
WORDS = (
    "name", "id", "type", "status", "kind", "version", "owner", "region", "zone", "path", "host", "port", "user",
    "email", "url", "title", "label", "color", "size", "count", "price", "total", "amount", "currency", "date",
    "start", "end", "created", "updated", "enabled", "active", "visible", "public", "required", "level", "score",
    "rank", "weight", "height", "width", "depth", "limit", "offset", "page", "query", "filter", "sort", "order",
    "group", "role", "token", "secret", "key", "value", "tag", "note", "summary", "message", "reason", "code",
    "category", "source", "target", "parent", "child", "index", "mode", "format", "unit", "locale", "timeout",
    "retries", "interval", "schedule", "image", "container", "volume", "mount", "network", "service", "cluster",
    "node", "pod", "replica", "selector", "template", "strategy",
)  # fmt: skip
LONG = (
    "the name under which others find it", "how long to wait, in seconds", "ignored unless the mode is strict",
    "an ISO 8601 date", "set by the server; clients must not write it", "see the manual for what this does",
)  # fmt: skip
PATTERNS = (
    "^[a-z][a-z0-9-]*$", "^[A-Z]{2,5}-[0-9]{1,6}$", "^(\\d{1,3}\\.){3}\\d{1,3}$", "^#[0-9a-fA-F]{6}$", "^[^\\s]+$",
    "^v?\\d+\\.\\d+\\.\\d+(-[0-9A-Za-z.-]+)?$", "^(GET|POST|PUT)$", "^\\+?[1-9]\\d{1,14}$", "[a-z]", "^.{1,20}$",
    "^/[\\w/.-]*$", "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$", "^(yes|no)?$",
)  # fmt: skip
FORMATS = (
    "date", "date-time", "time", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "duration", "uri-reference",
    "json-pointer", "color", "int32",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sample:
    """A schema, and the suite that its shape is from."""

    family: str
    schema: Schema


class Maker:
    """Schemas drawn by `rng`."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def word(self) -> str:
        words = self.rng.sample(WORDS, self.rng.choice((1, 1, 1, 2)))
        return self.rng.choice(("_".join(words), words[0] + "".join(word.title() for word in words[1:])))

    def words(self, count: int) -> list[str]:
        found: dict[str, None] = {}
        while len(found) < count:
            found[self.word()] = None
        return list(found)

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def noted(self, schema: Schema) -> Schema:
        """With a description, as most have."""
        return {"description": self.rng.choice(LONG), **schema} if self.chance(0.5) else schema

    # -- values -------------------------------------------------------------------------------------------------------

    def text(self) -> Schema:
        kind = self.rng.randrange(9)
        if kind == 0:
            return {"type": "string", "pattern": self.rng.choice(PATTERNS)}
        if kind == 1:
            return {"type": "string", "format": self.rng.choice(FORMATS)}
        if kind == 2:
            least = self.rng.randrange(3)
            return {"type": "string", "minLength": least, "maxLength": least + self.rng.choice((1, 8, 64, 255))}
        if kind == 3:
            return {"type": "string", "enum": self.words(self.rng.randint(1, 9))}
        return {"type": "string"}

    def number(self) -> Schema:
        low = self.rng.choice((-1000, -1, 0, 0, 1))
        kind = self.rng.randrange(7)
        if kind == 0:
            return {"type": "integer", "minimum": low, "maximum": low + self.rng.choice((1, 9, 255, 65535, 2**31))}
        if kind == 1:
            return {"type": "number", "exclusiveMinimum": low, "maximum": low + self.rng.choice((0.5, 1, 3.25, 1e6))}
        if kind == 2:
            return {"type": "integer", "multipleOf": self.rng.choice((2, 5, 60, 1000)), "minimum": 0}
        if kind == 3:
            return {"type": "number", "minimum": 0, "maximum": 1}
        return {"type": self.rng.choice(("integer", "number", "integer"))}

    def scalar(self) -> Schema:
        kind = self.rng.randrange(10)
        if kind < 5:
            return self.text()
        if kind < 8:
            return self.number()
        return {"type": "boolean"} if kind == 8 else {"const": self.rng.choice((self.word(), 1, True, None, 2.5))}

    def value(self, depth: int) -> Schema:
        """Any value, with objects and lists `depth` deep."""
        kind = self.rng.randrange(10) if depth > 0 else 9
        if kind == 0:
            return self.record(self.rng.randint(1, 4), depth - 1)
        if kind == 1:
            return self.list_of(self.value(depth - 1))
        if kind == 2:
            return {"type": "object", "additionalProperties": self.scalar()}
        if kind == 3:
            return {"anyOf": [self.value(depth - 1), self.rng.choice(({"type": "null"}, self.scalar()))]}
        return self.scalar()

    def list_of(self, item: Schema) -> Schema:
        found: Schema = {"type": "array", "items": item}
        if self.chance(0.5):
            found |= {"minItems": self.rng.randrange(2), "maxItems": self.rng.randint(1, 6)}
        return found

    def record(self, size: int, depth: int, *, closed: float = 0.5, required: float = 0.6) -> Schema:
        names = self.words(size)
        found: Schema = {
            "type": "object", "properties": {name: self.noted(self.value(depth)) for name in names},
            "required": [name for name in names if self.chance(required)],
        }  # fmt: skip
        if self.chance(closed):
            found["additionalProperties"] = False
        return found

    # -- families -----------------------------------------------------------------------------------------------------

    def function(self) -> Schema:
        """Parameters of a function."""
        return self.record(self.rng.randint(1, 6), 1, closed=0.1, required=0.7)

    def event(self) -> Schema:
        """Flat and closed, most of it optional or null."""
        names = self.words(self.rng.randint(5, 30))
        properties: Schema = {}
        for name in names:
            item = self.scalar()
            if isinstance(item.get("type"), str) and "enum" not in item and self.chance(0.3):
                item = {**item, "type": [item["type"], "null"]}
            properties[name] = self.noted(item)
        return {
            "description": "Schema for an event", "type": "object", "properties": properties,
            "required": names[: self.rng.randrange(4)], "additionalProperties": False,
        }  # fmt: skip

    def trivial(self) -> Schema:
        return self.record(self.rng.randint(1, 4), 0)

    def easy(self) -> Schema:
        head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": self.word().title()}
        return {**head, **self.record(self.rng.randint(3, 8), 1)}

    def medium(self) -> Schema:
        """Definitions, patterns of names, alternatives."""
        names = self.words(self.rng.randint(2, 5))
        shared: Schema = {name: self.record(self.rng.randint(1, 4), 1) for name in names}
        found = self.record(self.rng.randint(2, 5), 1)
        for name in names:
            link: Schema = {"$ref": f"#/definitions/{name}"}
            several = self.list_of(link), {"oneOf": [link, {"type": "string"}]}
            found["properties"][f"{name}_1"] = self.rng.choice((link, *several))
        if self.chance(0.4):
            found["patternProperties"] = {"^x-": self.scalar()}
        if self.chance(0.3):
            one, other = list(found["properties"])[:2]
            found["dependencies"] = {one: [other]}
        return {"$schema": "http://json-schema.org/draft-04/schema#", "definitions": shared, **found}

    def hard(self) -> Schema:
        """Inheritance, tagged unions, exclusive groups, recursion."""
        kinds = self.words(self.rng.randint(2, 5))
        base = self.record(2, 0, closed=0)
        shared: Schema = {"base": base}
        for kind in kinds:
            own = self.record(self.rng.randint(1, 3), 2, closed=0)
            own["properties"]["kind"] = {"const": kind}
            own["required"] = list(dict.fromkeys(["kind", *own["required"]]))
            shared[kind] = {"allOf": [{"$ref": "#/definitions/base"}, own]} if self.chance(0.4) else own
        shared["tree"] = {
            "type": "object", "additionalProperties": False, "required": ["leaf"],
            "properties": {"leaf": self.scalar(), "more": self.list_of({"$ref": "#/definitions/tree"})},
        }  # fmt: skip
        plain = [kind for kind in kinds if "allOf" not in shared[kind]]
        keyword = "oneOf" if len(plain) == len(kinds) else "anyOf"
        either = {keyword: [{"$ref": f"#/definitions/{kind}"} for kind in kinds]}
        first, second = self.words(2)
        group = {
            "type": "object", "properties": {first: self.scalar(), second: self.scalar()},
            "oneOf": [{"required": [first]}, {"required": [second]}],
        }  # fmt: skip
        found = self.record(3, 2)
        found["properties"] |= {"item": either, "tree": {"$ref": "#/definitions/tree"}, "group": group}
        found["required"] = list(dict.fromkeys([*found["required"], "item"]))
        return {"definitions": shared, **found}

    def ultra(self, size: int) -> Schema:
        """Very many definitions, of `size` bytes together."""
        names, shared, held = self.words(400), {}, 0
        for index, name in enumerate(names):
            part = self.record(self.rng.randint(4, 12), 1)
            for other in names[max(0, index - 2) : index]:
                part["properties"][other] = {"$ref": f"#/definitions/{other}"}
            shared[name] = part
            held += len(json.dumps(part, separators=(",", ":")))
            if held > size:
                break
        last = list(shared)
        return {
            "type": "object", "definitions": shared, "additionalProperties": False,
            "properties": {name: {"$ref": f"#/definitions/{name}"} for name in last[:: max(1, len(last) // 20)]},
        }  # fmt: skip

    def kubernetes(self) -> Schema:
        """A resource: metadata, maps of texts, null wherever something may be missing, integers or texts."""
        shared: Schema = {
            "ObjectMeta": {
                "type": "object",
                "properties": {
                    "name": {"type": ["string", "null"], "pattern": "^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$"},
                    "labels": {"type": ["object", "null"], "additionalProperties": {"type": ["string", "null"]}},
                    "ownerReferences": {"type": ["array", "null"], "items": {"$ref": "#/definitions/OwnerReference"}},
                    "creationTimestamp": {"anyOf": [{"type": "string", "format": "date-time"}, {"type": "null"}]},
                },
            },
            "OwnerReference": {
                "type": "object", "required": ["kind", "uid"],
                "properties": {
                    "kind": {"type": "string"}, "uid": {"type": "string"}, "controller": {"type": "boolean"},
                },
            },
            "IntOrString": {"oneOf": [{"type": ["string", "null"]}, {"type": "integer"}]},
        }  # fmt: skip
        spec = self.record(self.rng.randint(3, 9), 2, closed=0.3, required=0.3)
        spec["properties"] |= {
            "replicas": {"type": ["integer", "null"], "format": "int32"}, "port": {"$ref": "#/definitions/IntOrString"},
            "selector": {"type": "object", "additionalProperties": {"type": "string", "maxLength": 63}},
        }  # fmt: skip
        return {
            "description": self.rng.choice(LONG), "type": "object", "definitions": shared,
            "required": ["kind", "metadata"],
            "properties": {
                "apiVersion": {"type": ["string", "null"], "enum": ["v1", "apps/v1"]},
                "kind": {"const": self.word().title()},
                "metadata": {"$ref": "#/definitions/ObjectMeta", "description": "Standard object's metadata."},
                "spec": spec,
            },
            "additionalProperties": False,
        }  # fmt: skip

    def resource(self) -> Schema:
        """What an API of one publisher has: closed, with traits from definitions."""
        found = self.record(self.rng.randint(3, 8), 1, closed=1.0)
        found["properties"] |= {
            "_id": {"type": "string", "pattern": "^[A-Z0-9]{4,26}$"}, "geo": {"$ref": "#/definitions/geo"},
            "dates": {"$ref": "#/definitions/dates"}, "related": self.list_of({"$ref": "#/definitions/geo"}),
        }  # fmt: skip
        found["required"] += ["_id"]
        number = {"type": "number", "minimum": -180, "maximum": 180}
        geo = {
            "type": "object", "properties": {"latitude": number, "longitude": number}, "additionalProperties": False,
            "dependencies": {"latitude": ["longitude"], "longitude": ["latitude"]},
        }  # fmt: skip
        dates = {"type": "object", "properties": {"first": {"type": "string", "format": "date-time"}}}
        return {"definitions": {"geo": geo, "dates": dates}, **found}

    def client(self) -> Schema:
        """As Pydantic and Zod write them for structured output: all is required, nothing else allowed, and `$defs`."""
        names = [word.title() for word in self.words(self.rng.randint(1, 3))]
        shared: Schema = {name: self.record(self.rng.randint(1, 5), 1, closed=1.0, required=1.0) for name in names}
        for name in names:
            shared[name]["title"] = name
        steps = self.words(2)
        union = [
            {
                "type": "object", "additionalProperties": False, "required": ["type", "value"],
                "properties": {"type": {"const": step, "type": "string"}, "value": self.scalar()},
            }
            for step in steps
        ]  # fmt: skip
        found = self.record(self.rng.randint(1, 4), 0, closed=1.0, required=1.0)
        found["properties"] |= {
            "parts": {"type": "array", "items": {"$ref": f"#/$defs/{names[0]}"}, "title": "Parts"},
            "best": {"anyOf": [{"$ref": f"#/$defs/{names[-1]}"}, {"type": "null"}], "default": None},
            "step": {"oneOf": union, "discriminator": {"propertyName": "type"}},
        }  # fmt: skip
        found["required"] = list(found["properties"])
        return {"$defs": shared, "title": "Answer", **found}

    def lacking(self, index: int) -> Schema:
        """With something that grammars cannot keep to, in the middle of what they can."""
        wrong: tuple[Schema, ...] = (
            {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
            {"type": "string", "not": {"pattern": "^a"}},
            {"if": {"properties": {"a": {"const": 1}}}, "then": {"required": ["b"]}},
            {"oneOf": [{"type": "number"}, {"type": "integer"}]},
            {"type": "array", "contains": {"type": "integer"}},
            {"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}},
            {"type": "string", "pattern": "^(?!root$).*$"},
            {"type": "object", "unevaluatedProperties": False},
            {"type": "string", "format": "regex"},
            {"type": "string", "oneOf": [{"minLength": 2}, {"maxLength": 5}]},
        )
        found = self.record(3, 1)
        found["properties"]["odd"] = wrong[index % len(wrong)]
        return found


FAMILIES: tuple[tuple[str, int, Callable[[Maker, int], Schema]], ...] = (
    ("function calls", 80, lambda make, index: make.function()),
    ("events", 35, lambda make, index: make.event()),
    ("configuration, trivial", 30, lambda make, index: make.trivial()),
    ("configuration, easy", 60, lambda make, index: make.easy()),
    ("configuration, medium", 60, lambda make, index: make.medium()),
    ("configuration, hard", 45, lambda make, index: make.hard()),
    ("configuration, very large", 10, lambda make, index: make.ultra((8 << 10) + (11 << 10) * index)),
    ("Kubernetes", 40, lambda make, index: make.kubernetes()),
    ("an API's resources", 20, lambda make, index: make.resource()),
    ("Pydantic and Zod", 40, lambda make, index: make.client()),
    ("not to be kept to", 10, lambda make, index: make.lacking(index)),
)
"""Name, how many, and how one is made. What is missing to 500 are keywords one at a time."""


def suite() -> list[Sample]:
    """All 500, in their order."""
    return list(_made())


def _made() -> Iterator[Sample]:
    from benchmarks.schema_keywords import SCHEMAS

    for name, count, make in FAMILIES:
        for index in range(count):
            yield Sample(name, make(Maker(random.Random(f"{name}/{index}")), index))
    for schema in SCHEMAS:
        yield Sample("one keyword", schema)


def validator_of(schema: Any, formats: jsonschema.FormatChecker) -> Any:
    """The validator of the dialect that the schema names, or else has words of."""
    words = json.dumps(schema)
    older = '"dependencies"' in words or '"items": [' in words
    default = jsonschema.Draft7Validator if older else jsonschema.Draft202012Validator
    return jsonschema.validators.validator_for(schema, default)(schema, format_checker=formats)
