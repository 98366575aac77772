"""Tool calls as grammars, in the shape in which a family of models writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from core.errors import InvalidRequestError
from core.grammars import forms
from core.grammars.forms import Part, literal, mark, named
from core.parsers.events import ToolSchemas
from core.parsers.shapes import CallShape
from core.parsers.values import types_of

MAX_CALLS = 32
"""In one answer."""
MAX_NUMBER = 10**15
TEXT = r"/(.|\n)*/"
_NOTES = frozenset({
    "type", "title", "description", "default", "examples", "$schema", "$comment", "$id", "deprecated", "strict",
    "readOnly", "writeOnly",
})  # fmt: skip
_OF_ARGUMENTS = _NOTES | {"properties", "required", "additionalProperties", "$defs", "definitions"}
"""What the schema of all arguments may say where these are no JSON."""
_OPENING = frozenset({
    "additionalProperties", "unevaluatedProperties", "patternProperties", "minProperties", "allOf", "anyOf", "oneOf",
    "$ref", "if", "dependentSchemas",
})  # fmt: skip
"""With these, an object may have, or has to have, keys beside its `properties`."""
_OF_TEXTS = _NOTES | {"enum", "const", "$ref"}
_SCALARS = frozenset({"string", "number", "integer", "boolean", "null"})


class CallGrammar:
    """Grammars of calls of `tools`, whose schemas are checked. `special` are markup that are control tokens, by their
    ids. Raises `InvalidRequestError` about `param` for what a schema says and these calls cannot keep to."""

    def __init__(self, shape: CallShape, tools: ToolSchemas, special: Mapping[str, int], param: str = "tools") -> None:
        self._shape, self._special, self._param = shape, special, param
        self._heads = [f"{shape.begin}{name}{shape.middle}" for name in tools]
        self._rules: list[str] = []
        self._parts: list[Part] = []
        write = {"json": self._json, "tagged": self._tagged, "python": self._listed, "gemma": self._listed}
        for index, (name, schema) in enumerate(tools.items()):
            write[shape.arguments](index, name, schema)
        self._rules.append("call: " + self._each(""))

    def required(self, *, parallel: bool) -> list[Part]:
        """One call at least, and nothing else."""
        return self._whole(f"start: {self._calls(parallel, self._mark(self._shape.first), 'call')}")

    def offered(self, openings: Sequence[str], *, parallel: bool) -> list[Part]:
        """Text, in which there may be calls: what begins with one of the `openings` is one."""
        shape = self._shape
        head = shape.first + shape.begin
        opening = next((each for each in openings if head.startswith(each)), None)
        if opening is None:  # calls stand at the beginning of an answer alone
            calls, other = self._calls(parallel, self._mark(shape.first), "call"), (head or "[")[0]
            return self._whole(f"start: {calls} | (OTHER TEXT)?\nOTHER: /[^\\{other}]/\nTEXT: {TEXT}")
        if shape.first:
            calls = self._calls(parallel, self._mark(shape.first.removeprefix(opening)), "call")
        else:
            calls = self._calls(parallel, "", f"({self._each(opening)})")
        written = self._mark(opening)
        # Text has no control tokens, so one alone tells where it ends.
        trigger = f"trigger: TEXT {written}" if "<[" in written else f"trigger[lazy]: TEXT {written}"
        return self._whole(f"start: (trigger {calls}){'*' if parallel else '?'} TEXT\n{trigger}\nTEXT: {TEXT}")

    def _each(self, opening: str) -> str:
        """One call of any tool, behind an opening that has been written."""
        end = self._mark(self._shape.end)
        heads = (self._mark(head.removeprefix(opening)) for head in self._heads)
        return " | ".join(f"{head} arguments_{index} {end}" for index, head in enumerate(heads))

    def _calls(self, parallel: bool, first: str, call: str) -> str:
        shape = self._shape
        more = f"({self._mark(shape.between)} call){{0,{MAX_CALLS - 1}}}" if parallel else ""
        return f"{first} {call} {more} {self._mark(shape.last)}"

    def _whole(self, start: str) -> list[Part]:
        return [{"lark_grammar": "\n".join([start, *self._rules, ""])}, *self._parts]

    def _mark(self, text: str) -> str:
        return mark(text, self._special)

    # -- arguments ---------------------------------------------------------------------------------------------------

    def _json(self, index: int, name: str, schema: Mapping[str, Any]) -> None:
        whole = closed({"type": "object", **schema})
        self._rules.append(f"arguments_{index}: {self._value(f'json_{index}', whole)}")

    def _value(self, name: str, schema: Any) -> str:
        """JSON that a schema allows."""
        self._parts.append(named(name, forms.json_schema(schema)))
        return f"@{name}"

    def _properties(self, name: str, schema: Mapping[str, Any]) -> list[tuple[str, Any, bool]]:
        """Key, schema and whether it is required of each argument."""
        for keyword in schema.keys() - _OF_ARGUMENTS:
            if not keyword.startswith("x-"):
                self._refuse(name, keyword)
        properties, required = dict(schema.get("properties") or {}), list(schema.get("required") or ())
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        found = []
        for key in dict.fromkeys([*properties, *required]):
            given = properties.get(key, {})
            found.append((key, {**shared, **given} if isinstance(given, dict) else given, key in required))
        return found

    def _tagged(self, index: int, name: str, schema: Mapping[str, Any]) -> None:
        """Each argument between its tags, in the order of the schema."""
        shape, pieces = self._shape, []
        for number, (key, given, required) in enumerate(self._properties(name, schema)):
            is_text = types_of(schema, key) == {"string"}
            begin = shape.parameter_begin.replace("{key}", key).replace("{is_text}", "true" if is_text else "false")
            rule, end = f"argument_{index}_{number}", self._mark(shape.parameter_end)
            if not is_text:
                value = f"{self._value(f'json_{index}_{number}', given)} {end}"
            elif (texts := self._texts(name, key, given)) is not None:
                value = f"({' | '.join(map(literal, texts))}) {end}"
            elif "<[" in end:
                value = f"{rule.upper()} {end}"
                self._rules.append(f"{rule.upper()}: {TEXT}")
            else:
                value = f"text_{rule}"
                self._rules.append(f"text_{rule}[suffix={end}]: {TEXT}")
            self._rules.append(f"{rule}: {self._mark(begin)} {value}")
            pieces.append(rule if required else f"{rule}?")
        self._rules.append(f"arguments_{index}: " + (" ".join(pieces) or '""'))

    def _listed(self, index: int, name: str, schema: Mapping[str, Any]) -> None:
        """Arguments with commas between them, in the order of the schema."""
        python = self._shape.arguments == "python"
        properties = self._properties(name, schema)
        sign, comma, last = ("=", ", ", len(properties)) if python else (":", ",", len(properties))
        for number, (key, given, required) in enumerate(properties):
            item = f"argument_{index}_{number}"
            self._rules.append(f"{item}: {literal(key + sign)} {self._literal_value(name, key, schema, given, item)}")
            skip = ("", "") if required else (f" | first_{index}_{number + 1}", f" | more_{index}_{number + 1}")
            following = f"more_{index}_{number + 1}"
            self._rules.append(f"first_{index}_{number}: {item} {following}{skip[0]}")
            self._rules.append(f"more_{index}_{number}: {literal(comma)} {item} {following}{skip[1]}")
        self._rules += [f'first_{index}_{last}: ""', f'more_{index}_{last}: ""', f"arguments_{index}: first_{index}_0"]

    def _literal_value(self, name: str, key: str, schema: Mapping[str, Any], given: Any, rule: str) -> str:
        """A value as a Python literal, of which JSON is a part where these are read, or in Gemma's way."""
        if self._shape.arguments == "python":
            return self._value(f"json_{rule}", _bounded(given))
        kinds = types_of(schema, key)
        if not kinds or kinds - _SCALARS:
            self._refuse(name, f"properties/{key}", "only texts, numbers, true, false and null can be kept to")
        choices = []
        for kind in sorted(kinds):
            if kind == "string":
                choices.append(self._quoted(name, key, given, rule))
            else:
                own = {**given, "type": kind} if isinstance(given, dict) and "$ref" not in given else {"type": kind}
                choices.append(self._value(f"json_{rule}_{kind}", _bounded(own)))
        return f"({' | '.join(choices)})"

    def _quoted(self, name: str, key: str, given: Any, rule: str) -> str:
        """A text between two of Gemma's quotes."""
        quote, texts = self._mark(self._shape.quote), self._texts(name, key, given)
        if texts is not None:
            return f"{quote} ({' | '.join(map(literal, texts))}) {quote}"
        if "<[" in quote:
            self._rules.append(f"{rule.upper()}: {TEXT}")
            return f"{quote} {rule.upper()} {quote}"
        self._rules.append(f"text_{rule}[suffix={quote}]: {TEXT}")
        return f"{quote} text_{rule}"

    def _texts(self, name: str, key: str, given: Any) -> list[str] | None:
        """The texts that a value may be, which is written as it is; None: any."""
        value, pointer = given, f"properties/{key}"
        if isinstance(value, dict):
            for keyword in value.keys() - _OF_TEXTS - {"$defs", "definitions"}:
                if not keyword.startswith("x-"):
                    self._refuse(name, f"{pointer}/{keyword}")
            if "$ref" in value:
                self._refuse(name, f"{pointer}/$ref")
            choices = value.get("enum", [value["const"]] if "const" in value else None)
            return None if choices is None else [text for text in choices if isinstance(text, str)]
        return None

    def _refuse(self, name: str, pointer: str, reason: str = "this model's calls cannot keep to it") -> None:
        raise InvalidRequestError(
            f"The parameters of {name} have /{pointer[:200]}, and {reason}.", param=self._param
        )  # fmt: skip


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The same without arguments that it does not name, where it leaves open whether there may be others: a function
    that is called with them fails. Families without JSON have none of these either."""
    names = schema.get("properties")
    if not isinstance(names, dict) or schema.keys() & _OPENING or not names.keys() >= set(schema.get("required") or ()):
        return schema
    return {**schema, "additionalProperties": False}


def _bounded(schema: Any) -> Any:
    """The same with bounds for numbers that have none: these parsers make numbers of them, and 1e999 is none."""
    if isinstance(schema, list):
        return [_bounded(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _bounded(value) for key, value in schema.items()}
    kinds = schema.get("type")
    if kinds == "number" or (isinstance(kinds, list) and "number" in kinds):
        if not schema.keys() & {"minimum", "exclusiveMinimum"}:
            found["minimum"] = -MAX_NUMBER
        if not schema.keys() & {"maximum", "exclusiveMaximum"}:
            found["maximum"] = MAX_NUMBER
    return found
