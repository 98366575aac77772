"""`/`: what this is and how to go on, as a page for browsers and as JSON for others.

Public, so it says no more of the server than its name and version. The page loads nothing and runs nothing.
"""

from __future__ import annotations

import secrets

from flask import Blueprint, Response, current_app, render_template, request

from core.api.body import json_response
from core.api.context import api_context
from core.security.access import policy, policy_of

blueprint = Blueprint("front", __name__)

PLACES = {
    "/dashboard": "the dashboard",
    "/health": "whether the server is well, part by part",
    "/ready": "whether the model answers",
    "/v1/models": "the models that are served",
    "/api/pipeline/status": "placement, memory and speed",
    "/metrics": "figures for Prometheus",
    "/docs": "every route, as a page",
    "/openapi.json": "every route, as OpenAPI",
}
"""Where to go on, as far as this application has it."""


@blueprint.get("/")
@policy(public=True)
def front() -> Response:
    """The page for whoever would rather have HTML than anything else, such as a browser."""
    version = api_context().version
    if request.accept_mimetypes.best != "text/html":
        response = json_response({"name": "VRAMancer", "version": version, "places": list(_places())})
    else:
        nonce = secrets.token_urlsafe(16)
        page = render_template("front.html", version=version, url=request.host_url, places=_places(), nonce=nonce)
        response = protected(Response(page, mimetype="text/html"), nonce)
    response.vary.add("Accept")
    return response


def protected(page: Response, nonce: str) -> Response:
    """The page, of which browsers take no more than its text and the style of this `nonce`."""
    page.headers["Content-Security-Policy"] = (
        f"default-src 'none'; style-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    page.headers["Referrer-Policy"] = "no-referrer"
    page.headers["X-Content-Type-Options"] = "nosniff"
    page.headers["Cache-Control"] = "no-store"  # it may spell the host that was asked for
    return page


def _places() -> dict[str, tuple[str, bool]]:
    """By path: what is there, and whether it needs the token."""
    endpoints = {rule.rule: rule.endpoint for rule in current_app.url_map.iter_rules()}
    found = {}
    for path, text in PLACES.items():
        if path in endpoints:
            declared = policy_of(current_app.view_functions[endpoints[path]])
            found[path] = (text, declared is None or declared.role is not None)
    return found
