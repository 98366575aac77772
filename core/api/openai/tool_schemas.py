"""Whether the parameters of a tool are a JSON schema. What is wrong is named by a JSON pointer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from core.errors import InvalidRequestError
from core.grammars.schemas import LISTS, MAPS, SCHEMAS, resolve

TYPES = frozenset({"string", "number", "integer", "boolean", "array", "object", "null"})
MAX_REFERENCE = 1024
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_NUMBERS = ("minimum", "maximum", "multipleOf")
_EXCLUSIVE = ("exclusiveMinimum", "exclusiveMaximum")
_TEXTS = ("title", "description", "pattern", "format", "$ref")


def check_schema(schema: Any, param: str, *, of_object: bool = True) -> None:
    """Raise `InvalidRequestError`, about `param`, unless `schema` is one, and, with `of_object`, one of an object.
    Keywords that are not known are left alone, as JSON schema has it."""
    _Checker(schema, param, of_object).check()


def find_key(schema: Any, key: str) -> str | None:
    """JSON pointer of the first schema that has `key`, with the key; None if there is none."""
    checker = _Checker(schema, "", False)
    todo: list[tuple[Any, str]] = [(schema, "")]
    while todo:
        value, pointer = todo.pop(0)
        if isinstance(value, dict):
            if key in value:
                return f"{pointer}/{_escaped(key)}"
            todo += checker.inner(value, pointer)
    return None


class _Checker:
    def __init__(self, schema: Any, param: str, of_object: bool) -> None:
        self._schema = schema
        self._param = param
        self._of_object = of_object

    def check(self) -> None:
        """The whole schema, level by level: JSON from a body is no deeper than the body may be."""
        schema = self._schema
        if not isinstance(schema, dict):
            self._refuse("", "must be an object")
        if self._of_object and schema.get("type", "object") != "object":
            self._refuse("/type", "must be object, since arguments are one")
        todo: list[tuple[Any, str]] = [(schema, "")]
        while todo:
            value, pointer = todo.pop()
            if isinstance(value, bool):
                continue
            if not isinstance(value, dict):
                self._refuse(pointer, "must be a schema: an object, true or false")
            self._check_keywords(value, pointer)
            todo += self.inner(value, pointer)

    def inner(self, schema: dict[str, Any], pointer: str) -> list[tuple[Any, str]]:
        """The schemas within a schema, with their pointers."""
        listed = isinstance(schema.get("items"), list)  # what `prefixItems` were called before
        single = (key for key in SCHEMAS if key in schema and not (key == "items" and listed))
        found = [(schema[key], f"{pointer}/{key}") for key in single]
        for key in MAPS:
            inner = schema.get(key, {})
            if not isinstance(inner, dict):
                self._refuse(f"{pointer}/{key}", "must be an object of schemas")
            found += [(item, f"{pointer}/{key}/{_escaped(name)}") for name, item in inner.items()]
        for key in LISTS:
            inner = schema.get(key)
            if isinstance(inner, list) and inner:
                found += [(item, f"{pointer}/{key}/{index}") for index, item in enumerate(inner)]
            elif key != "items" and key in schema:
                self._refuse(f"{pointer}/{key}", "must be a list of schemas, one at least")
        return found

    def _check_keywords(self, schema: dict[str, Any], pointer: str) -> None:
        kinds = schema.get("type", [])
        kinds = kinds if isinstance(kinds, list) else [kinds]
        if not all(isinstance(kind, str) and kind in TYPES for kind in kinds):
            self._refuse(f"{pointer}/type", f"must be one or several of {', '.join(sorted(TYPES))}")
        rules: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
            (_TEXTS, lambda value: isinstance(value, str), "must be a string"),
            (_NUMBERS, _is_number, "must be a number"),
            (
                _EXCLUSIVE,
                lambda value: isinstance(value, (int, float)),
                "must be a number, or true or false as in draft 4",
            ),
            (_COUNTS, lambda value: _is_number(value) and value >= 0 and value == int(value), "must be 0 or more"),
            (("enum",), lambda value: isinstance(value, list) and bool(value), "must be a list, with a value at least"),
            (("required",), _are_names, "must be a list of names, none of them twice"),
            (("uniqueItems",), lambda value: isinstance(value, bool), "must be true or false"),
        )
        for keys, holds, reason in rules:
            for key in keys:
                if key in schema and not holds(schema[key]):
                    self._refuse(f"{pointer}/{key}", reason)
        if "$ref" in schema:
            self._check_reference(schema["$ref"], f"{pointer}/$ref")

    def _check_reference(self, reference: str, pointer: str) -> None:
        if not (reference == "#" or reference.startswith("#/")) or len(reference) > MAX_REFERENCE:
            self._refuse(pointer, "must begin with #/, since this server looks nothing up elsewhere")
        if resolve(self._schema, reference) is None:
            self._refuse(pointer, "points to nothing")

    def _refuse(self, pointer: str, reason: str) -> None:
        where = f" at {pointer[:200]}" if pointer else ""
        raise InvalidRequestError(
            f"{self._param} is no JSON schema{' of an object' if self._of_object else ''}:{where} {reason}.",
            param=self._param,
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _are_names(value: Any) -> bool:
    return (
        isinstance(value, list) and all(isinstance(name, str) for name in value) and len(set(value)) == len(value)
    )  # fmt: skip


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
