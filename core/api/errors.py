"""One map from errors to answers: in OpenAI's shape `{"error": {"message", "type", "param", "code"}}`, but for paths of
APIs that have one of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from flask import Flask, Response, current_app, request
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from core.api.body import json_response
from core.api.context import current_span
from core.errors import (
    AuthenticationError,
    ChatTemplateError,
    InvalidRequestError,
    NotFoundError,
    PayloadTooLargeError,
    UnavailableError,
    VRAMancerError,
)
from core.logs import get_logger

log = get_logger(__name__)

CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that left; nobody reads the answer, metrics and logs do

MAX_LOGGED = 300  # characters of a refusal's reason: a model's name may be as long as a path


class ClientDisconnectedError(Exception):
    """The client closed its connection before the answer was complete."""


def register_error_handlers(app: Flask, shapes: Mapping[str, ErrorShape]) -> None:
    """Every error of a request goes through one of these. `shapes` are those of paths that have their own."""
    app.extensions[SHAPES] = shapes
    app.register_error_handler(VRAMancerError, _answer_error)
    app.register_error_handler(HTTPException, _answer_http)
    app.register_error_handler(ClientDisconnectedError, _answer_disconnected)
    app.register_error_handler(Exception, _answer_unexpected)


def unexpected_error() -> VRAMancerError:
    """What a client is told of a bug: nothing. The log has the cause, under the request's id."""
    return VRAMancerError("The server failed; the cause is in its log.", code="internal_error")


ErrorShape = Callable[[VRAMancerError], dict[str, Any]]
"""Writes an error as an API has it."""
SHAPES = "vramancer_error_shapes"


def _body(error: VRAMancerError) -> dict[str, Any]:
    """The error as clients of the path that was asked for know it. The path counts, not the route, since a request may
    be refused before there is one."""
    shapes: Mapping[str, ErrorShape] = current_app.extensions[SHAPES]
    shape = shapes.get(request.path.rstrip("/"))
    return shape(error) if shape is not None else error.to_openai()


def _answer_error(error: VRAMancerError) -> Response:
    _tell_trace(error)
    response = json_response(_body(error), error.status)
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, AuthenticationError):
        response.headers["WWW-Authenticate"] = "Bearer"
    if error.status >= 500:
        log.error("request failed", error=error.message, code=error.error_code)
    else:
        _log_refusal(error, error.status)
    return response


def _tell_trace(error: Exception) -> None:
    span = current_span()
    if span is not None:
        span.fail(error)


def _log_refusal(error: VRAMancerError, status: int, **more: str) -> None:
    """Why a request was refused, without what it held: a template's own words may quote its messages."""
    said = None if isinstance(error, ChatTemplateError) else _in_one_line(error.message)
    param = _in_one_line(error.param or "")
    log.info("request refused", status=status, code=error.error_code, param=param, reason=said, **more)


def _in_one_line(text: str) -> str:
    """Names that a client made up may hold anything."""
    return text[:MAX_LOGGED] if text.isprintable() else repr(text[:MAX_LOGGED])


def _answer_http(error: HTTPException) -> Response | HTTPException:
    """Flask's and Werkzeug's own errors: no such route, wrong method, body too large, and so on."""
    status = error.code or 500
    if status < 400:  # a redirect
        return error
    shown = _shown(error, status)
    if status < 500:
        _log_refusal(shown, status, asked=_in_one_line(request.path))
    response = json_response(_body(shown), status)
    for name, value in error.get_headers():
        if name.lower() not in ("content-type", "content-length"):
            response.headers[name] = value
    return response


def _shown(error: HTTPException, status: int) -> VRAMancerError:
    if isinstance(error, RequestEntityTooLarge):
        return PayloadTooLargeError("The request body is larger than this server accepts.")
    if status == 404:
        return NotFoundError("There is no such route.")
    code = error.name.lower().replace(" ", "_")
    return (InvalidRequestError if status < 500 else VRAMancerError)(error.description or error.name, code=code)


def _answer_disconnected(_: ClientDisconnectedError) -> Response:
    log.info("client left before the answer was complete")
    return Response(status=CLIENT_CLOSED_REQUEST)


def _answer_unexpected(error: Exception) -> Response:
    """A bug, or no memory. Registered for Exception, as the last resort of every request."""
    log.error("request failed unexpectedly", error=repr(error), exc_info=error)
    _tell_trace(error)
    if isinstance(error, MemoryError):
        return _answer_error(UnavailableError("The server has too little memory for this request."))
    return json_response(_body(unexpected_error()), 500)
