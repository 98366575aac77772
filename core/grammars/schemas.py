"""JSON schemas in the words that llguidance has, without what only describes.

Nothing becomes allowed that was not. `oneOf` becomes `anyOf` where its branches exclude each other, or can be made to
by leaving out a property; what was allowed and cannot be said so is then not written. The rest is left as it is, for
llguidance to keep to or to refuse.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

SCHEMAS = (
    "items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames", "unevaluatedProperties",
    "unevaluatedItems", "additionalItems",
)  # fmt: skip
EXCLUSIVE = (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum"))
MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
"""Keywords whose values are a schema, schemas by name, and lists of schemas."""
NOTES = frozenset({
    "title", "description", "default", "example", "examples", "$comment", "deprecated", "readOnly", "writeOnly",
    "contentEncoding", "contentMediaType", "contentSchema",
})  # fmt: skip
FORMATS = frozenset({
    "date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown",
    "idn-email", "idn-hostname", "uri-template", "iri", "iri-reference", "regex",
})  # fmt: skip
"""Those that llguidance keeps to, and those of the standard that it refuses. Any other name only describes."""
_PCHAR = r"([A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})"
_POINTER = r"(/([^/~]|~[01])*)*"
PATTERNS = {
    "json-pointer": f"^{_POINTER}$",
    "relative-json-pointer": f"^(0|[1-9][0-9]*)(#|{_POINTER})$",
    "uri-reference": rf"^(/|(/?{_PCHAR.replace(':', '')}+)?(/{_PCHAR}+)*/?)(\?({_PCHAR}|[/?])*)?(#({_PCHAR}|[/?])*)?$",
}
"""Formats of the standard in place of which a pattern does. URI references are those without a scheme and a host."""
TYPES = frozenset({"string", "integer", "fraction", "boolean", "array", "object", "null"})
"""Of values, such that no value has two of them."""
STEP = 1e-9
"""Between a bound that numbers must not have, and the next that they may; times the bound, if that is more than 1."""
MAX_BRANCHES = 32
"""Of a `oneOf`; each is compared with all others."""
MAX_REFERENCES = 32
"""One behind the other."""


def rewritten(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema in fewer words. It is no deeper than JSON in a body may be."""
    found = _Rewriter(schema).node(schema)
    if not isinstance(found, dict):
        return {"not": {}}
    if all(resolve(found, reference) is not None for reference in _references(found)):
        return found
    return dict(schema)  # a reference led through something that has been put otherwise


def resolve(root: Any, reference: str) -> Any:
    """What a reference within `root` means; None: nothing."""
    found = root
    for part in reference.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        elif isinstance(found, Mapping) and name in found:
            found = found[name]
        else:
            return None
    return found


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        reference = schema.get("$ref")
        if isinstance(reference, str):
            yield reference
        for value in schema.values():
            yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


class _Rewriter:
    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root

    def node(self, schema: Any) -> Any:
        if not isinstance(schema, Mapping):
            return schema
        found = {key: self._inner(key, value) for key, value in schema.items() if key not in NOTES}
        self._drop(found)
        self._format(found)
        self._bounds(found)
        self._dependencies(found)
        if "not" in found and (found["not"] == {} or found["not"] is True):
            return False
        self._not(found)
        self._least(found)
        self._one_of(found, schema)
        return found

    def _inner(self, key: str, value: Any) -> Any:
        if key in SCHEMAS and not isinstance(value, list):
            return self.node(value)
        if key in MAPS and isinstance(value, Mapping):
            return {name: self.node(item) for name, item in value.items()}
        if key in LISTS and isinstance(value, list):
            return [self.node(item) for item in value]
        return value

    def _drop(self, found: dict[str, Any]) -> None:
        """What has no effect."""
        if found.get("uniqueItems") is False or (isinstance(most := found.get("maxItems"), int) and most <= 1):
            found.pop("uniqueItems", None)
        if not found.keys() & {"then", "else"}:
            found.pop("if", None)
        if "if" not in found:
            found.pop("then", None)
            found.pop("else", None)
        if found.get("not") is False:
            del found["not"]

    def _format(self, found: dict[str, Any]) -> None:
        name = found.get("format")
        if isinstance(name, str) and name not in FORMATS:
            del found["format"]
            if name in PATTERNS:
                _add(found, {"pattern": PATTERNS[name]})

    def _bounds(self, found: dict[str, Any]) -> None:
        """An exclusive bound that is whole, where the other bound is less than 1 away, as one that is inclusive and a
        little further in: of `exclusiveMinimum` 0 and `maximum` 0.5, llguidance lets 0 through."""
        for exclusive, inclusive in EXCLUSIVE:
            if isinstance(is_so := found.get(exclusive), bool):  # as in draft 4
                del found[exclusive]
                if is_so and inclusive in found:
                    found[exclusive] = found.pop(inclusive)
        lows, highs = ([found[key] for key in keys if _is_number(found.get(key))] for keys in EXCLUSIVE)
        if found.get("type") == "integer" or not lows or not highs or not 0 < min(highs) - max(lows) < 1:
            return
        for (exclusive, inclusive), bounds, sign in zip(EXCLUSIVE, (lows, highs), (1, -1), strict=True):
            bound = found.get(exclusive)
            if _is_number(bound) and float(bound).is_integer():
                del found[exclusive]
                inner = bound + sign * max(STEP, abs(bound) * STEP)
                found[inclusive] = max(inner, *bounds) if sign > 0 else min(inner, *bounds)

    def _dependencies(self, found: dict[str, Any]) -> None:
        """What one property asks of others: it is not there, or the others are as they should."""
        for keyword in ("dependencies", "dependentRequired", "dependentSchemas"):
            given = found.get(keyword)
            if isinstance(given, Mapping) and all(isinstance(item, (list, Mapping, bool)) for item in given.values()):
                del found[keyword]
                for name, item in given.items():
                    then = {"required": item} if isinstance(item, list) else self.node(item)
                    if then not in ({"required": []}, {}, True):
                        _add(found, {"anyOf": [_without(name), then]})

    def _not(self, found: dict[str, Any]) -> None:
        """Properties that are not required, but forbidden. Values without properties have all that are required."""
        alternatives = _missing(found.get("not"))
        kinds = found.get("type", "object")
        if not alternatives or "object" not in ([kinds] if isinstance(kinds, str) else kinds):
            return
        del found["not"]
        found["type"] = "object"
        choices = [_without(*names) for names in alternatives]
        _add(found, choices[0] if len(choices) == 1 else {"anyOf": choices})

    def _least(self, found: dict[str, Any]) -> None:
        """One property at least, where there may be others than those with names: one of the names."""
        named, needs, least = found.get("properties"), _names(found), found.get("minProperties")
        names = list(named) if isinstance(named, Mapping) else []
        if not 0 < len(names) <= MAX_BRANCHES or set(names) <= set(needs) or _forbids(found, ""):
            return
        if least == 1 or (isinstance(least, int) and least <= len(needs)):
            del found["minProperties"]
            if not needs:
                _add(found, {"anyOf": [{"required": [name]} for name in names]})

    # -- oneOf --------------------------------------------------------------------------------------------------------

    def _one_of(self, found: dict[str, Any], schema: Mapping[str, Any]) -> None:
        branches = found.get("oneOf")
        if not isinstance(branches, list) or not 0 < len(branches) <= MAX_BRANCHES:
            return
        given, around, always = schema["oneOf"], self._types(schema), _names(schema)
        choices = []
        for index, branch in enumerate(branches):
            absent: set[str] = set()
            for other, against in enumerate(given):
                names = () if index == other else self._apart(given[index], against, around, always)
                if names is None:
                    return
                absent.update(names)
            if absent:
                branch = {"allOf": [branch, {"type": "object", **_without(*sorted(absent))}]}
            choices.append(branch)
        del found["oneOf"]
        if "anyOf" in found:
            _add(found, {"anyOf": choices})
        else:
            found["anyOf"] = choices

    def _apart(
        self, schema: Any, other: Any, around: frozenset[str], always: list[str]
    ) -> tuple[str, ...] | None:  # fmt: skip
        """Properties that values of `schema` must not have, lest they are some of `other`, too; None: nobody knows.
        Both are among values of the types `around` that have the properties `always`."""
        mine, theirs = self._types(schema) & around, self._types(other) & around
        if not mine & theirs:
            return ()
        values, others = self._values(schema), self._values(other)
        if values is not None and others is not None:
            return None if values & others else ()
        unbound = mine == theirs == TYPES
        if not unbound and not mine <= {"object"}:
            return None
        schema, other = self._target(schema), self._target(other)
        if not isinstance(schema, Mapping) or not isinstance(other, Mapping):
            return None
        has, needs = _names(schema), _names(other)
        if mine <= {"object"}:
            if any(_forbids(other, name) for name in has) or any(_forbids(schema, name) for name in needs):
                return ()
            for name in has:
                values, others = (self._values(_property(each, name)) for each in (schema, other))
                if values is not None and others is not None and not values & others:
                    return ()
        apart = next((name for name in needs if name not in has and name not in always), None)
        return None if apart is None else (apart,)

    def _target(self, schema: Any) -> Any:
        """The schema that a reference alone leads to. With others beside it, dialects differ in whether these count."""
        for _ in range(MAX_REFERENCES):
            if not isinstance(schema, Mapping) or not isinstance(schema.get("$ref"), str):
                return schema
            if schema.keys() - NOTES != {"$ref"}:
                return {}
            schema = resolve(self._root, schema["$ref"])
        return {}

    def _types(self, schema: Any) -> frozenset[str]:
        """Types that its values may have, or more."""
        schema = self._target(schema)
        if not isinstance(schema, Mapping):
            return frozenset() if schema is False else TYPES
        given = schema.get("type")
        names = [given] if isinstance(given, str) else given if isinstance(given, list) else list(TYPES)
        found = {name for name in names if isinstance(name, str)}
        if "number" in found:
            found |= {"integer", "fraction"}
        values = self._values(schema)
        if values is not None:
            found &= {_type(json.loads(value)) for value in values}
        return frozenset(found) & TYPES

    def _values(self, schema: Any) -> set[str] | None:
        """All its values, as JSON; None: not counted."""
        schema = self._target(schema)
        if not isinstance(schema, Mapping):
            return None
        if "const" in schema:
            return {_text(schema["const"])}
        given = schema.get("enum")
        return {_text(value) for value in given} if isinstance(given, list) else None


def _add(found: dict[str, Any], more: dict[str, Any]) -> None:
    """What holds, too."""
    found["allOf"] = [*found.get("allOf", ()), more]


def _without(*names: str) -> dict[str, Any]:
    return {"properties": dict.fromkeys(names, False)}


def _missing(schema: Any) -> list[tuple[str, ...]]:
    """Properties of which all have to be missing, in one of these ways, where `schema` does not hold. Empty: it says
    something else."""
    if not isinstance(schema, dict) or len(schema) != 1:
        return []
    ((keyword, value),) = schema.items()
    if not isinstance(value, list) or not value:
        return []
    if keyword == "required":
        return [(name,) for name in value]
    if keyword not in ("anyOf", "allOf"):
        return []
    inner = [_missing(each) for each in value]
    if keyword == "allOf":
        return [] if [] in inner else [names for each in inner for names in each]
    if any(len(each) != 1 for each in inner):
        return []
    return [tuple(name for each in inner for name in each[0])]


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _names(schema: Mapping[str, Any]) -> list[str]:
    """Properties that are required."""
    given = schema.get("required")
    return [name for name in given if isinstance(name, str)] if isinstance(given, list) else []


def _property(schema: Mapping[str, Any], name: str) -> Any:
    given = schema.get("properties")
    return given.get(name) if isinstance(given, Mapping) else None


def _forbids(schema: Mapping[str, Any], name: str) -> bool:
    """Whether no value of the schema has the property."""
    given = schema.get("properties")
    known = given if isinstance(given, Mapping) else {}
    if name in known:
        return known[name] is False
    return schema.get("additionalProperties") is False and not schema.get("patternProperties")


def _text(value: Any) -> str:
    """A value as JSON, the same for the same value."""
    return json.dumps(_whole(value), sort_keys=True)


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _whole(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _type(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "null" if value is None else "boolean"
    if isinstance(value, float):
        return "fraction"
    return {int: "integer", str: "string", list: "array", dict: "object"}[type(value)]
