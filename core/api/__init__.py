"""The HTTP API: `create_app(pipeline)` makes the Flask application."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flask import Blueprint, Flask
from flask_cors import CORS

from core.api import front, management, memory, monitoring, native, tokens
from core.api.anthropic import answers as anthropic_answers
from core.api.anthropic import messages
from core.api.context import EXTENSION, REQUEST_ID_HEADER, ApiContext, LiveRequests, check_policies, register_hooks
from core.api.embedding import embeddings, ranking
from core.api.errors import register_error_handlers
from core.api.llamacpp import routes as llamacpp
from core.api.ollama import answers as ollama_answers
from core.api.ollama import embed as ollama_embed
from core.api.ollama import routes as ollama
from core.api.openai import batch, chat, completions, models
from core.api.openapi import routes as openapi
from core.api.responses import routes as responses
from core.api.responses.background import BackgroundResponses
from core.api.responses.store import ResponseStore
from core.security.access import TOKEN_HEADERS, CallerLimits, SignedIn, nobody
from core.security.token import resolve_token

if TYPE_CHECKING:
    from core.inference_pipeline import InferencePipeline

__all__ = ["create_app"]

BLUEPRINTS = (
    completions.blueprint,
    chat.blueprint,
    batch.blueprint,
    models.blueprint,
    messages.blueprint,
    responses.blueprint,
    ollama.blueprint,
    ollama_embed.blueprint,
    llamacpp.blueprint,
    embeddings.blueprint,
    ranking.blueprint,
    native.blueprint,
    tokens.blueprint,
    management.blueprint,
    memory.blueprint,
    monitoring.blueprint,
    front.blueprint,
    openapi.blueprint,
)

ERROR_SHAPES = {
    "/v1/messages": anthropic_answers.error_body,
    "/v1/messages/count_tokens": anthropic_answers.error_body,
    **dict.fromkeys(
        ("/api/chat", "/api/embed", "/api/tags", "/api/show", "/api/ps", "/api/version"), ollama_answers.error_body
    ),
}
"""How errors are written on paths of APIs that are not OpenAI's."""
OPENAI_PREFIX = "/v1"
OPENAI_ROUTES = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/models",
    "/v1/models/<path:name>",
    "/v1/embeddings",
    "/v1/rerank",
    "/v1/reranking",
    "/v1/score",
)
"""What clients also find without the prefix, which some leave out of the address that they are given."""
CORS_HEADERS = (
    "Authorization",
    "Content-Type",
    REQUEST_ID_HEADER,
    *TOKEN_HEADERS,
    r"(x-stainless|openai|anthropic)-[a-z0-9-]+$",  # what OpenAI's and Anthropic's clients say of themselves
)


def create_app(
    pipeline: InferencePipeline,
    *,
    token: str | None = None,
    version: str | None = None,
    more: Sequence[Blueprint] = (),
    signed_in: SignedIn = nobody,
) -> Flask:
    """The application that serves `pipeline`.

    Args:
        token: what clients have to send; None takes it from the settings, or the generated one from its file.
        version: of the program, for those who ask what this is; None says none.
        more: routes beside the API's, such as the dashboard's.
        signed_in: who has a session, for those of them that ask for one.

    Raises:
        ConfigError: there is no usable token.
        RuntimeError: a route has no policy.
    """
    settings = pipeline.settings
    if token is None:
        token = resolve_token(settings).value
    app = Flask(__name__, static_folder=None)
    # One more than is accepted: Werkzeug cuts a chunked body off there, and `read_request` then knows it is too long.
    app.config["MAX_CONTENT_LENGTH"] = settings.api.max_body_bytes + 1
    security = settings.security
    limits = None if security.disable_rate_limit else CallerLimits(security.requests_per_minute)
    app.extensions[EXTENSION] = ApiContext(pipeline, token, LiveRequests(), limits, version, signed_in)
    app.extensions[responses.STORE] = ResponseStore()
    app.extensions[responses.BACKGROUND] = BackgroundResponses()
    app.url_map.strict_slashes = False
    app.url_map.redirect_defaults = False  # an alias answers itself
    register_error_handlers(app, ERROR_SHAPES)
    register_hooks(app)
    for blueprint in (*BLUEPRINTS, *more):
        app.register_blueprint(blueprint)
    _add_aliases(app)
    check_policies(app)
    if settings.api.cors_origins:
        CORS(
            app,
            origins=list(settings.api.cors_origins),
            allow_headers=list(CORS_HEADERS),
            expose_headers=[REQUEST_ID_HEADER, "Retry-After"],
        )
    return app


def _add_aliases(app: Flask) -> None:
    """The same routes, with the same policies, under their short paths."""
    for rule in [rule for rule in app.url_map.iter_rules() if rule.rule in OPENAI_ROUTES]:
        methods = sorted((rule.methods or set()) - {"HEAD", "OPTIONS"})  # which Flask adds
        short = rule.rule.removeprefix(OPENAI_PREFIX)
        app.add_url_rule(short, rule.endpoint, app.view_functions[rule.endpoint], methods=methods, alias=True)
