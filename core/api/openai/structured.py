"""Answers in a form that the client gives: `response_format`, vLLM's `structured_outputs` and `guided_*`, and
llama.cpp's `json_schema` and `grammar`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.api.openai.tool_schemas import check_schema, find_key
from core.errors import InvalidRequestError, UnsupportedParameterError
from core.grammars import forms
from core.request import MAX_GRAMMAR_BYTES

if TYPE_CHECKING:
    from core.api.openai.schemas import OpenAIFields
    from core.engine.submission import LoadedModel

MAX_CHOICES = 1024
BACKENDS = ("auto", "guidance", "llguidance")
FORMS = ("json", "json_object", "regex", "choice", "grammar")
_IGNORED = {"disable_fallback": (True, False), "_backend": BACKENDS, "disable_additional_properties": (False,),
            "disable_any_whitespace": (False,)}  # fmt: skip
"""What vLLM knows beside, with the values that are true here."""
_KEYS = re.compile(r'Unimplemented keys: \["([^"]+)"')


@dataclass(frozen=True, slots=True)
class Form:
    """What the answer keeps to. `param` is the field that says so; `schema` its JSON schema, if it is one."""

    part: forms.Part
    param: str
    schema: Any = None

    def where(self, reason: str) -> str:
        """Where in the schema the first keyword is that `reason` names."""
        found = _KEYS.search(reason)
        pointer = find_key(self.schema, found[1]) if found is not None else None
        return f", at {pointer[:200]}" if pointer else ""


def read_form(fields: OpenAIFields) -> Form | None:
    """What a request asks for; None: text. Raises `InvalidRequestError`, or `UnsupportedParameterError`."""
    space = _space(fields.guided_whitespace_pattern, "guided_whitespace_pattern")
    if fields.guided_decoding_backend is not None and fields.guided_decoding_backend not in BACKENDS:
        raise UnsupportedParameterError(
            f"guided_decoding_backend takes {', '.join(BACKENDS)}.", param="guided_decoding_backend"
        )
    found = [
        _form(kind, value, f"guided_{kind}", space)
        for kind in ("json", "regex", "choice", "grammar")
        if (value := getattr(fields, f"guided_{kind}")) is not None
    ]
    if fields.json_schema is not None:
        found.append(_schema(fields.json_schema, "json_schema", space))
    if fields.grammar:  # empty it asks for nothing
        found.append(_form("grammar", fields.grammar, "grammar", space))
    if fields.structured_outputs is not None:
        found.append(_structured(fields.structured_outputs))
    if fields.response_format is not None and (form := _response_format(fields.response_format, space)) is not None:
        found.append(form)
    if len(found) > 1:
        raise InvalidRequestError(
            f"An answer can keep to one form only: {' and '.join(form.param for form in found)} are given.",
            param=found[1].param,
        )
    return found[0] if found else None


def form_of(kind: str, value: Any, param: str) -> Form:
    """A form by its kind: json, json_object, regex, choice or grammar. Raises as `read_form`."""
    return _form(kind, value, param, forms.SPACE)


def grammar_of(form: Form, model: LoadedModel) -> str:
    """The grammar, compiled once to see that it can be kept to. Raises `InvalidRequestError`."""
    return checked(forms.compose(form.part), model, form.param, form.where)


def checked(
    grammar: str, model: LoadedModel, param: str, where: Callable[[str], str] = lambda reason: ""
) -> str:  # fmt: skip
    """A grammar that can be kept to. Raises `InvalidRequestError` about `param`."""
    if len(grammar.encode("utf-8", errors="surrogatepass")) > MAX_GRAMMAR_BYTES:
        raise InvalidRequestError(f"{param} has more than {MAX_GRAMMAR_BYTES} bytes as a grammar.", param=param)
    try:
        grammars = model.tokenizer.grammars(model.eos_token_ids)
    except UnsupportedParameterError as error:
        error.param = param
        raise
    grammars.check(grammar, param, where)
    return grammar


def _response_format(value: Mapping[str, Any], space: str) -> Form | None:
    kind, param = value.get("type"), "response_format"
    if kind == "text":
        return None
    if kind == "json_object" and value.get("schema") is not None:  # as llama.cpp takes it
        return _schema(value["schema"], f"{param}.schema", space)
    if kind == "json_object":
        return Form(forms.json_schema(forms.JSON_OBJECT, space=space), param)
    if kind != "json_schema":
        raise InvalidRequestError(f"{param}.type must be text, json_object or json_schema.", param=f"{param}.type")
    given, param = value.get("json_schema"), f"{param}.json_schema"
    if not isinstance(given, dict):
        raise InvalidRequestError(f"{param} must be an object with a schema.", param=param)
    strict = given.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise InvalidRequestError(f"{param}.strict must be true or false.", param=f"{param}.strict")
    if given.get("schema") is None:
        raise InvalidRequestError(f"{param}.schema is missing.", param=f"{param}.schema")
    return _schema(given["schema"], f"{param}.schema", space, lenient=strict is False)


def _structured(value: Mapping[str, Any]) -> Form:
    param = "structured_outputs"
    given = {key: item for key, item in value.items() if item is not None and key != "whitespace_pattern"}
    for key, accepted in _IGNORED.items():
        if key in given and given.pop(key) not in accepted:
            raise UnsupportedParameterError(f"{param}.{key} takes {accepted} alone.", param=f"{param}.{key}")
    unknown = sorted(given.keys() - set(FORMS))
    if unknown:
        raise UnsupportedParameterError(f"{param}.{unknown[0][:64]} is not supported.", param=param)
    if given.get("json_object") is False:
        del given["json_object"]
    if len(given) != 1:
        raise InvalidRequestError(f"{param} must have one of {', '.join(FORMS)}.", param=param)
    ((kind, item),) = given.items()
    return _form(kind, item, f"{param}.{kind}", _space(value.get("whitespace_pattern"), f"{param}.whitespace_pattern"))


def _form(kind: str, value: Any, param: str, space: str) -> Form:
    if kind == "json":
        return _schema(value, param, space)
    if kind == "json_object":
        if value is not True:
            raise InvalidRequestError(f"{param} must be true.", param=param)
        return Form(forms.json_schema(forms.JSON_OBJECT, space=space), param)
    if kind == "choice":
        if not isinstance(value, list) or not 0 < len(value) <= MAX_CHOICES or not all(map(_is_text, value)):
            raise InvalidRequestError(f"{param} must be a list of 1 to {MAX_CHOICES} texts.", param=param)
        return Form(forms.choice(value), param)
    if not _is_text(value):
        raise InvalidRequestError(f"{param} must be a text that is not empty.", param=param)
    try:
        return Form(forms.regex(value) if kind == "regex" else forms.rules(value), param)
    except Exception as error:  # noqa: BLE001  whatever its reader raises for a client's text
        raise InvalidRequestError(f"{param} cannot be read: {str(error)[:200]}", param=param) from None


def _schema(value: Any, param: str, space: str, *, lenient: bool = False) -> Form:
    if isinstance(value, str):
        from core.api.body import parse_object

        try:
            value = parse_object(value.encode("utf-8", errors="replace"))
        except InvalidRequestError as error:
            raise InvalidRequestError(f"{param} is no JSON object: {error.message}", param=param) from None
    check_schema(value, param, of_object=False)
    return Form(forms.json_schema(value, space=space, lenient=lenient), param, value)


def _space(value: Any, param: str) -> str:
    if value is None:
        return forms.SPACE
    if not isinstance(value, str) or len(value) > 256:
        raise InvalidRequestError(f"{param} must be a regular expression of at most 256 characters.", param=param)
    return value


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and "\0" not in value
