"""Bodies made from the schemas that `/openapi.json` shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

DEPTH = 4
TEXTS = st.text(max_size=12)
NUMBERS = st.one_of(
    st.integers(-3, 40), st.sampled_from([0.0, 0.5, 1.5, -1e308, 1e308, 2**31, -(2**63), 10**40]), st.floats(-2, 2)
)
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=4,
)


class Bodies:
    """Strategies for the schemas of one document."""

    def __init__(self, schemas: Mapping[str, Any]) -> None:
        self._schemas = schemas
        self._made: dict[tuple[str, int], st.SearchStrategy[Any]] = {}

    def valid(self, schema: Mapping[str, Any], depth: int = DEPTH) -> st.SearchStrategy[Any]:
        """What a schema takes: of deeper ones little, of formats nothing."""
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            if (name, depth) not in self._made:
                self._made[name, depth] = st.deferred(lambda: self.valid(self._schemas[name], depth))
            return self._made[name, depth]
        if "enum" in schema or "const" in schema:
            return st.sampled_from(schema["enum"] if "enum" in schema else [schema["const"]])
        if "anyOf" in schema:
            return st.one_of([self.valid(each, depth) for each in schema["anyOf"]])
        kind = schema.get("type")
        if kind == "object":
            return self._object(schema, depth)
        if kind == "array":
            items = self.valid(schema.get("items", {}), depth - 1) if depth else st.nothing()
            return st.lists(items, min_size=schema.get("minItems", 0), max_size=min(3, schema.get("maxItems", 3)))
        if kind == "string":
            return st.text(min_size=schema.get("minLength", 0), max_size=min(12, schema.get("maxLength", 12)))
        if kind == "integer":
            least = schema.get("minimum", -3)
            return st.integers(least, min(schema.get("maximum", least + 40), least + 40))
        if kind == "number":
            return st.floats(schema.get("minimum", -2), schema.get("maximum", 2)) | st.integers(0, 1)
        return {"boolean": st.booleans(), "null": st.none()}.get(str(kind), ANYTHING)

    def _object(self, schema: Mapping[str, Any], depth: int) -> st.SearchStrategy[Any]:
        fields = (
            {name: self.valid(each, depth - 1) for name, each in schema.get("properties", {}).items()} if depth else {}
        )
        if not fields:
            return st.dictionaries(TEXTS, ANYTHING, max_size=2)
        required = set(schema.get("required", ()))
        optional = sorted(fields.keys() - required)
        chosen = st.lists(st.sampled_from(optional), max_size=4, unique=True) if optional else st.just([])
        return chosen.flatmap(
            lambda names: st.fixed_dictionaries({name: fields[name] for name in (*sorted(required), *names)})
        )

    def spoiled(self, schema: Mapping[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
        """The same with a value of any kind in one place."""

        def spoil(body: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
            known = schema
            while "$ref" in known:
                known = self._schemas[known["$ref"].rpartition("/")[2]]
            names = st.sampled_from(sorted(known.get("properties", body) or ["x"]))
            return st.builds(lambda name, value: {**body, name: value}, names, ANYTHING)

        return self.valid(schema).flatmap(spoil)
