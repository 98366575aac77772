"""What every request has: the pipeline, an id, a caller, a log line; and the requests under way."""

from __future__ import annotations

import re
import threading
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import structlog
from flask import Flask, Response, current_app, g, request

from core.errors import AuthenticationError, InvalidRequestError, ModelNotFoundError
from core.logs import get_logger
from core.security.access import CallerLimits, Principal, SignedIn, authorize, given_tokens, nobody, policy_of
from core.security.admission import REFUSAL_KEY

if TYPE_CHECKING:
    from core.engine.submission import LoadedModel
    from core.inference_pipeline import InferencePipeline
    from core.tracing.server import ServerSpan

log = get_logger(__name__)

EXTENSION = "vramancer"
REQUEST_ID_HEADER = "X-Request-ID"
UNMATCHED = "unmatched"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
QUIET_RULES = frozenset({"/live", "/ready", "/health", "/metrics"})  # asked every few seconds by machines
WATCHED_RULES = frozenset(
    {
        "/api/pipeline/status",
        "/api/queue/status",
        "/api/batcher/stats",
        "/api/gpu",
        "/api/system",
        "/api/nodes",
        "/api/memory",
        "/api/tasks",
    }
)  # asked every second by dashboards

PASSED_ON = "/v1/chat/completions, /v1/completions and /v1/embeddings"
"""Routes that other servers answer for their models."""
_SANE_ID = re.compile(r"[!-~]{1,128}")


class LiveRequests:
    """Maps the id that the client knows (`X-Request-ID`) to the engine's ids; several requests may share one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._engine_ids: dict[str, set[str]] = {}

    def add(self, request_id: str, engine_id: str) -> None:
        with self._lock:
            self._engine_ids.setdefault(request_id, set()).add(engine_id)

    def discard(self, request_id: str, engine_id: str) -> None:
        """Forget a request that ended. Safe to call twice."""
        with self._lock:
            engine_ids = self._engine_ids.get(request_id, set())
            engine_ids.discard(engine_id)
            if not engine_ids:
                self._engine_ids.pop(request_id, None)

    def engine_ids(self, name: str) -> list[str]:
        """The engine's ids of the requests called `name`; `name` itself when it is none of the clients' ids."""
        with self._lock:
            return sorted(self._engine_ids.get(name, ())) or [name]

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._engine_ids.values()))


@dataclass(frozen=True, slots=True)
class ApiContext:
    """Made once by `create_app`, kept in the application's extensions."""

    pipeline: InferencePipeline
    token: str
    live: LiveRequests
    limits: CallerLimits | None = None
    version: str | None = None
    signed_in: SignedIn = nobody


def api_context() -> ApiContext:
    """The context of the application that answers the current request."""
    return cast(ApiContext, current_app.extensions[EXTENSION])


def current_span() -> ServerSpan | None:
    """The current request's, if its trace is recorded."""
    span: ServerSpan | None = g.get("span")
    return span


def served_model(name: str | None) -> LoadedModel:
    """The loaded model, if `name` is one of its names or None.

    Raises:
        InvalidRequestError: another server's model is asked for, on a route that is not passed on.
        ModelNotLoadedError: no model is loaded.
        ModelNotFoundError: another model is asked for.
    """
    pipeline = api_context().pipeline
    group = pipeline.upstreams.named.get(name or "")
    if group is not None and not group.has_self:
        raise InvalidRequestError(
            f"'{name}' is a model of another server; it is asked by {PASSED_ON} alone.", param="model",
            code="upstream_model",
        )  # fmt: skip
    model = pipeline.model
    span = current_span()
    if span is not None:
        span.set(gen_ai__request__model=name or model.name)
    if name is not None and not model.knows(name) and group is None:
        raise ModelNotFoundError(f"The model '{name}' is not served here; '{model.name}' is.", param="model")
    return model


def others_answer() -> bool:
    """Whether requests may be answered by something else than our engine; see `core.api.upstreams.answered`."""
    pipeline = api_context().pipeline
    return bool(pipeline.upstreams.named) or pipeline.settings.backend.allow_stub


def register_hooks(app: Flask) -> None:
    app.before_request(_identify)
    app.before_request(_authorize)
    app.before_request(_trace)
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
    refusal = request.environ.get(REFUSAL_KEY)
    if refusal is not None:
        raise refusal
    context = api_context()
    given = given_tokens(request.environ)
    declared = policy_of(current_app.view_functions[request.endpoint]) if request.endpoint is not None else None
    read_only = context.pipeline.settings.security.read_only
    try:
        g.principal = authorize(
            declared,
            request.method,
            given,
            context.token,
            read_only=read_only,
            signed_in=lambda: context.signed_in(request.environ),
        )
    except AuthenticationError:
        _limit(context.limits, None, has_token=any(given))
        raise
    _limit(context.limits, g.principal, has_token=any(given))


def _limit(limits: CallerLimits | None, principal: Principal | None, *, has_token: bool) -> None:
    """Count the request by its key, or else by its address. A token that is wrong counts on public routes too, since
    their answers tell it from the right one."""
    if limits is None:
        return
    is_quiet = request.url_rule is not None and request.url_rule.rule in QUIET_RULES
    if principal is None and (has_token or not is_quiet):
        limits.check_stranger(request.remote_addr, wrong_token=has_token)
    elif principal is not None and not is_quiet:
        limits.check_key(principal.owner)


def _trace() -> None:
    """Begin the span of a request that waits for the engine, or changes something: what only looks has none. Nor has a
    caller who may not."""
    tracing = api_context().pipeline.tracing
    if tracing is None or request.endpoint is None or request.method == "OPTIONS":
        return
    declared = policy_of(current_app.view_functions[request.endpoint])
    if declared is None or not (declared.waits or declared.mutates):
        return
    path = _canonical_rule()
    attributes: dict[str, str | int] = {
        "http.request.method": request.method,
        "http.route": path,
        "url.path": request.path,
        "url.scheme": request.scheme,
        "client.address": request.remote_addr or "",
        "network.protocol.version": request.environ.get("SERVER_PROTOCOL", "").removeprefix("HTTP/"),
        "user_agent.original": request.user_agent.string,
        "vramancer.http.request_id": g.request_id,
    }
    headers = request.headers
    g.span = tracing.serve(
        f"{request.method} {path}", attributes, headers.get("traceparent"), headers.get("tracestate")
    )
    if g.span is not None:
        where = g.span.context
        structlog.contextvars.bind_contextvars(trace_id=where.trace_id, span_id=where.span_id)


def check_policies(app: Flask) -> None:
    """Raise `RuntimeError` for a route that does not say who may call it."""
    for rule in app.url_map.iter_rules():
        if policy_of(app.view_functions[rule.endpoint]) is None:
            raise RuntimeError(f"{rule.rule}: declare the route's policy (core.security.access.policy).")


def _canonical_rule() -> str:
    """The route that answers, whichever of its paths the client took: an alias counts as what it stands for."""
    rule = request.url_rule
    if rule is None:
        return UNMATCHED
    if not rule.alias:
        return rule.rule
    return next(other.rule for other in current_app.url_map.iter_rules(rule.endpoint) if not other.alias)


def _finish(response: Response) -> Response:
    response.headers[REQUEST_ID_HEADER] = g.request_id
    metrics = api_context().pipeline.metrics
    path = _canonical_rule()
    method = request.method if request.method in METHODS else "other"
    started_s, status, request_id, span = g.started_s, response.status_code, g.request_id, current_span()

    def observe() -> None:
        seconds = time.perf_counter() - started_s
        trace_id = span.context.trace_id if span is not None else ""
        metrics.observe_http(path, method, status, seconds, request_id, trace_id)
        usual = path in QUIET_RULES or (path in WATCHED_RULES and status < 400)
        write = log.debug if usual else log.info
        write("request answered", method=method, path=path, status=status, seconds=round(seconds, 6))
        if span is not None:
            span.end(status)

    if response.is_streamed:
        response.call_on_close(observe)  # a stream's latency ends with its last event
    else:
        observe()
    return response
