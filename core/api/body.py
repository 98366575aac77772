"""JSON in and out. A body is read once, strictly, into a schema; what is wrong with it is a 4xx that says what."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NoReturn, TypeVar

from flask import Response, g, request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from core.api.context import api_context
from core.errors import (
    InvalidRequestError,
    PayloadTooLargeError,
    UnsupportedMediaTypeError,
    UnsupportedParameterError,
)

MAX_DEPTH = 64  # nested lists and objects
MAX_PARAM_LENGTH = 256  # the name of an unknown field is the client's, and may be as long as a body
MAX_COUNT = 2**31 - 1  # largest token count or id that makes sense anywhere
MAX_NAME_LENGTH = 4096  # of a model: a path may be that long
UNSUPPORTED = "Not supported: only what asks for nothing is taken."
NOTHING: tuple[Any, ...] = ()  # no value of the parameter is accepted but null


def whole(value: Any) -> Any:
    """A number without a fraction as an integer, however it is written: in JSON, 1.0 is one. Lists: what is in them."""
    if isinstance(value, list):
        return [whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _text_or_objects(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
        return value
    raise ValueError("Input should be a string or a list of objects")


Unsupported = Mapping[str, tuple[Any, ...]]
ModelName = Annotated[str, Field(max_length=MAX_NAME_LENGTH)]
Integer = Annotated[int, BeforeValidator(whole)]
Integers = Annotated[list[int], BeforeValidator(whole)]
TextOrObjects = Annotated[str | list[dict[str, Any]], BeforeValidator(_text_or_objects)]


class RequestModel(BaseModel):
    """A request body. Fields it does not know are ignored, except those in `unsupported`.

    `unsupported` maps each parameter that clients know but this server does not honour to the values that ask for
    nothing special and are accepted beside null; `instead` says what does a like thing here.
    """

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    unsupported: ClassVar[Unsupported] = {}
    instead: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """With what is not supported, as the values of it that are taken."""
        shown = handler(schema)
        properties = handler.resolve_ref_schema(shown).setdefault("properties", {})
        for name, accepted in cls.unsupported.items():
            properties[name] = {"enum": [None, *accepted], "description": UNSUPPORTED}
        return shown

    @classmethod
    def refuse_unsupported(cls, body: Mapping[str, Any]) -> None:
        """Raise `UnsupportedParameterError` for a parameter that would have to be ignored."""
        for name, accepted in cls.unsupported.items():
            value = body.get(name)
            if value is None or any(_same(value, item) for item in accepted):
                continue
            only = f"; {' or '.join(map(to_json, accepted))} alone is accepted" if accepted else ""
            other = f"; use {cls.instead[name]}" if name in cls.instead else ""
            raise UnsupportedParameterError(f"{name} is not supported by this server{only}{other}.", param=name)


def _same(value: Any, other: Any) -> bool:
    """Equal as JSON: 1 is 1.0, but not true."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


JSON = "application/json"
UNTYPED = (JSON, "", "application/x-www-form-urlencoded")
Schema = TypeVar("Schema", bound=RequestModel)
Route = TypeVar("Route", bound=Callable[..., Any])
_ATTRIBUTE = "route_body"


@dataclass(frozen=True, slots=True)
class Body:
    """What a route takes: one of these schemas, or, if it is `optional`, no body at all."""

    schemas: tuple[type[RequestModel], ...]
    optional: bool = False


def reads(*schemas: type[RequestModel], optional: bool = False) -> Callable[[Route], Route]:
    """Declare what a route hands to `read_request`: `@reads(ChatRequest)`. `/openapi.json` says so."""

    def declare(route: Route) -> Route:
        setattr(route, _ATTRIBUTE, Body(schemas, optional))
        return route

    return declare


def body_of(route: Callable[..., Any]) -> Body | None:
    """What was declared; None for a route that reads no body."""
    return getattr(route, _ATTRIBUTE, None)


def to_json(payload: Any) -> str:
    """Compact JSON. Raises ValueError for NaN and infinity, which JSON does not have."""
    return json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def json_response(payload: Any, status: int = 200) -> Response:
    return Response(to_json(payload) + "\n", status=status, mimetype="application/json")


def read_request(schema: type[Schema], *, untyped: bool = False) -> Schema:
    """The current request's body as `schema`. `untyped`: for APIs that never look at its type, whose clients send none,
    or what curl sends of itself. No such route may take a session for a token.

    Raises:
        UnsupportedMediaTypeError: not application/json in UTF-8.
        PayloadTooLargeError: longer than api.max_body_bytes; known before it is read.
        InvalidRequestError: not JSON, not an object, or not what the schema says.
        UnsupportedParameterError: a parameter that is known but not honoured.
    """
    return validated(schema, read_body(untyped=untyped))


def validated(schema: type[Schema], body: Mapping[str, Any]) -> Schema:
    """The same for a body that was read already."""
    schema.refuse_unsupported(body)
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        raise from_validation_error(error) from None


def read_body(*, untyped: bool = False) -> dict[str, Any]:
    """The current request's body as it came, read once. Raises what `read_request` does of what is no JSON object."""
    if "body" not in g:
        g.body = parse_object(_read_bytes(UNTYPED if untyped else (JSON,)))
    body: dict[str, Any] = g.body
    return body


def from_validation_error(error: ValidationError) -> InvalidRequestError:
    """The first problem that pydantic found, as a 400 that names the field: `messages[0].role`."""
    detail = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = _param(detail["loc"])
    message = detail["msg"].removeprefix("Value error, ")
    return InvalidRequestError(f"{param}: {message}" if param else message, param=param or None)


def _param(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")[:MAX_PARAM_LENGTH]


def _read_bytes(types: Sequence[str]) -> bytes:
    if request.mimetype not in types:
        raise UnsupportedMediaTypeError("The body must be JSON, sent with Content-Type: application/json.")
    if request.mimetype_params.get("charset", "utf-8").lower() not in ("utf-8", "utf8"):
        raise UnsupportedMediaTypeError("The body must be encoded in UTF-8.")
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise UnsupportedMediaTypeError("The body must not be compressed.")
    limit = api_context().pipeline.settings.api.max_body_bytes
    if (request.content_length or 0) > limit:
        raise PayloadTooLargeError(f"The body has {request.content_length} bytes; this server accepts {limit}.")
    data = request.get_data(cache=False)
    if len(data) > limit:  # only a chunked body, whose length is not known beforehand
        raise PayloadTooLargeError(f"The body has more than the {limit} bytes that this server accepts.")
    return data


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object with unique keys, finite numbers, text that UTF-8 can express, and at most `MAX_DEPTH` levels."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"The body is not UTF-8: byte {error.start} cannot be decoded.") from None
    try:
        body = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise InvalidRequestError(f"The body is not valid JSON: {error}.") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # int() refuses thousands of digits
        raise InvalidRequestError("The body holds a number with too many digits.") from None
    if not isinstance(body, dict):
        raise InvalidRequestError("The body must be a JSON object.")
    _check_values(body, may_hold_surrogates="\\u" in text)
    return body


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise InvalidRequestError(f"The body gives {_shown(twice)} twice.", param=_shown(twice))
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidRequestError(f"The body is not valid JSON: {name} is not a JSON number.")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise InvalidRequestError("The body holds a number that is too large.")
    return value


def _too_deep() -> InvalidRequestError:
    return InvalidRequestError(f"The body is nested more than {MAX_DEPTH} levels deep.")


def _check_values(body: dict[str, Any], *, may_hold_surrogates: bool) -> None:
    """Check depth, level by level, and surrogates, which only a backslash escape can bring in."""
    level: list[Any] = [body]
    for _ in range(MAX_DEPTH):
        children: list[Any] = []
        for container in level:
            if isinstance(container, dict):
                if may_hold_surrogates:
                    _check_text(container)
                container = container.values()
            if may_hold_surrogates:
                _check_text(container)
            children.extend(value for value in container if isinstance(value, (dict, list)))
        if not children:
            return
        level = children
    raise _too_deep()


def _check_text(values: Any) -> None:
    for value in values:
        if isinstance(value, str):
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                raise InvalidRequestError("The body holds half of a surrogate pair, which is not text.") from None


def _shown(key: str) -> str:
    return key[:64].encode("utf-8", "replace").decode()
