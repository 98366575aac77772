"""A dashboard of its own process, for a server that runs elsewhere: the application around the blueprint."""

from __future__ import annotations

import math
from collections.abc import Callable

from flask import Flask, Response, jsonify, redirect, request
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response as AnyResponse

from core.errors import AuthenticationError, InvalidRequestError, NotFoundError, VRAMancerError
from core.logs import get_logger
from core.security.access import CallerLimits, Environ, authorize, given_tokens, policy, policy_of
from core.security.admission import REFUSAL_KEY, REFUSED, Admission
from dashboard.board import Dashboard

log = get_logger(__name__)


def create_standalone_app(dashboard: Dashboard, token: str, limits: CallerLimits | None) -> Flask:
    """The dashboard alone, under the policies that its routes declare. Changes are refused by the server that it
    shows, if that takes none."""
    app = Flask(__name__, static_folder=None)
    app.url_map.strict_slashes = False

    @app.before_request
    def check() -> None:
        refusal = request.environ.get(REFUSAL_KEY)
        if refusal is not None:
            raise refusal
        given = given_tokens(request.environ)
        try:
            _authorize(app, dashboard, token, request.environ, request.endpoint)
        except AuthenticationError:
            if limits is not None:
                limits.check_stranger(request.remote_addr, wrong_token=any(given))
            raise

    @app.get("/")
    @policy(public=True)
    def front() -> AnyResponse:
        return redirect("/dashboard")

    @app.get("/live")
    @policy(public=True)
    def live() -> Response:
        return jsonify({"status": "alive"})

    app.register_error_handler(VRAMancerError, _answer_error)
    app.register_error_handler(HTTPException, _answer_http)
    app.register_error_handler(Exception, _answer_unexpected)
    app.register_blueprint(dashboard.blueprint)
    return app


def admission_of(app: Flask, dashboard: Dashboard, token: str) -> Callable[[Environ], Admission]:
    """What the server in front asks before it reads a body."""

    def admit(environ: Environ) -> Admission:
        try:
            endpoint, _ = app.url_map.bind_to_environ(dict(environ)).match()
            _authorize(app, dashboard, token, environ, endpoint)
        except (HTTPException, VRAMancerError):
            return REFUSED
        declared = policy_of(app.view_functions[endpoint])
        if declared is None:
            return REFUSED
        return Admission(True, declared.waits, declared.mutates, declared.role is None)

    return admit


def _authorize(app: Flask, dashboard: Dashboard, token: str, environ: Environ, endpoint: str | None) -> None:
    declared = policy_of(app.view_functions[endpoint]) if endpoint is not None else None
    authorize(
        declared,
        environ["REQUEST_METHOD"],
        given_tokens(environ),
        token,
        read_only=False,
        signed_in=lambda: dashboard.gate.signed_in(environ),
    )


def _answer_error(error: VRAMancerError) -> Response:
    response = jsonify(error.to_openai())
    response.status_code = error.status
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    return response


def _answer_http(error: HTTPException) -> Response | HTTPException:
    code = error.code or 500
    if code < 400:
        return error
    shown = NotFoundError("There is no such route.") if code == 404 else InvalidRequestError(error.description or "")
    response = _answer_error(shown)
    response.status_code = code
    return response


def _answer_unexpected(error: Exception) -> Response:
    log.error("request failed unexpectedly", error=repr(error), exc_info=error)
    return _answer_error(VRAMancerError("The dashboard failed; the cause is in its log.", code="internal_error"))
