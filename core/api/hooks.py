"""What happens around every request: its id, its token, read-only mode, its latency and its log line."""

from __future__ import annotations

import re
import time
import uuid

import structlog
from flask import Flask, Response, g, request

from core.api.body import discard_unread_body
from core.api.context import api_context
from core.errors import AuthenticationError
from core.logs import get_logger
from core.security import policy
from core.security.token import bearer_token, check_token

log = get_logger(__name__)

REQUEST_ID_HEADER = "X-Request-ID"
TOKEN_HEADER = "X-API-TOKEN"
UNMATCHED = "unmatched"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
QUIET_RULES = frozenset({"/live", "/ready", "/health", "/metrics"})  # asked every few seconds by machines

_SANE_ID = re.compile(r"[!-~]{1,128}")


def register_hooks(app: Flask) -> None:
    app.before_request(_identify)
    app.before_request(_authorize)
    app.after_request(_finish)


def _identify() -> None:
    """Take the client's request id if it is printable ASCII of at most 128 characters, else make one."""
    g.started_s = time.perf_counter()
    given = request.headers.get(REQUEST_ID_HEADER, "")
    g.request_id = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
    # Left bound after the answer, because a stream goes on in this thread; the next request clears it.
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(request_id=g.request_id)


def _authorize() -> None:
    context = api_context()
    rule = request.url_rule.rule if request.url_rule is not None else None
    given = (request.headers.get(TOKEN_HEADER), bearer_token(request.headers.get("Authorization")))
    try:
        check_token(given, context.token)
        g.authenticated = True
    except AuthenticationError:
        g.authenticated = False
        if not policy.is_public(rule, request.method):
            raise
    policy.check_read_only(rule, request.method, read_only=context.pipeline.settings.security.read_only)


def _finish(response: Response) -> Response:
    discard_unread_body()
    response.headers[REQUEST_ID_HEADER] = g.request_id
    metrics = api_context().pipeline.metrics
    path = request.url_rule.rule if request.url_rule is not None else UNMATCHED
    method = request.method if request.method in METHODS else "other"
    started_s, status = g.started_s, response.status_code

    def observe() -> None:
        seconds = time.perf_counter() - started_s
        metrics.observe_http(path, method, status, seconds)
        write = log.debug if path in QUIET_RULES else log.info
        write("request answered", method=method, path=path, status=status, seconds=round(seconds, 6))

    if response.is_streamed:
        response.call_on_close(observe)  # a stream's latency ends with its last event
    else:
        observe()
    return response
