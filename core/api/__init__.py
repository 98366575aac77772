"""The HTTP API: `create_app(pipeline)` makes the Flask application."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flask import Flask
from flask_cors import CORS

from core.api import management, memory, monitoring, native, tokens
from core.api.context import EXTENSION, REQUEST_ID_HEADER, ApiContext, LiveRequests, check_policies, register_hooks
from core.api.errors import register_error_handlers
from core.api.openai import batch, chat, completions, models
from core.security.access import CallerLimits
from core.security.token import resolve_token

if TYPE_CHECKING:
    from core.inference_pipeline import InferencePipeline

__all__ = ["create_app"]

BLUEPRINTS = (
    completions.blueprint,
    chat.blueprint,
    batch.blueprint,
    models.blueprint,
    native.blueprint,
    tokens.blueprint,
    management.blueprint,
    memory.blueprint,
    monitoring.blueprint,
)


def create_app(pipeline: InferencePipeline, *, token: str | None = None) -> Flask:
    """The application that serves `pipeline`.

    Args:
        token: what clients have to send; None takes it from the settings, or the generated one from its file.

    Raises:
        ConfigError: there is no usable token.
        RuntimeError: a route has no policy.
    """
    settings = pipeline.settings
    if token is None:
        token, _, _ = resolve_token(settings)
    app = Flask(__name__, static_folder=None)
    # One more than is accepted: Werkzeug cuts a chunked body off there, and `read_request` then knows it is too long.
    app.config["MAX_CONTENT_LENGTH"] = settings.api.max_body_bytes + 1
    security = settings.security
    limits = None if security.disable_rate_limit else CallerLimits(security.requests_per_minute)
    app.extensions[EXTENSION] = ApiContext(pipeline, token, LiveRequests(), limits)
    register_error_handlers(app)
    register_hooks(app)
    for blueprint in BLUEPRINTS:
        app.register_blueprint(blueprint)
    check_policies(app)
    if settings.api.cors_origins:
        CORS(
            app,
            origins=list(settings.api.cors_origins),
            allow_headers=["Authorization", "Content-Type", "X-API-TOKEN", REQUEST_ID_HEADER],
            expose_headers=[REQUEST_ID_HEADER, "Retry-After"],
        )
    return app
