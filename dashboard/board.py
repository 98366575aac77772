"""The dashboard's pages and sessions, and what makes one: gate, live data, routes."""

from __future__ import annotations

from pathlib import Path

from flask import Blueprint, Response, jsonify, render_template, request, send_from_directory

from core.config import DashboardSettings
from core.errors import NotFoundError
from core.security.access import policy
from dashboard.calls import add_calls
from dashboard.gate import COOKIE_PATHS, Gate, cookie_name, is_secure
from dashboard.gateway import ApiGateway
from dashboard.live import LiveHub
from dashboard.poller import Poller, Publish
from dashboard.sessions import SessionTable

FOLDER = Path(__file__).parent
STATIC = FOLDER / "static"
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
"""Pages load nothing from elsewhere, run no script but their files, and never make HTML or scripts from text."""
HOUR_S = 3600.0


class Dashboard:
    """A dashboard of the server that `gateway` reaches. `bound_to` is the address that it is served at."""

    def __init__(
        self,
        gateway: ApiGateway,
        settings: DashboardSettings,
        *,
        bound_to: str,
        max_body_bytes: int,
        version: str | None = None,
    ) -> None:
        self.gate = Gate(SessionTable(settings.session_hours * HOUR_S), bound_to, settings.origins)

        def make_poller(publish: Publish) -> Poller:
            return Poller(gateway, publish, prometheus_url=settings.prometheus_url)

        self.live = LiveHub(self.gate, make_poller, settings.max_viewers)
        self.blueprint = create_blueprint(gateway, self.gate, max_body_bytes=max_body_bytes, version=version)


def create_blueprint(gateway: ApiGateway, gate: Gate, *, max_body_bytes: int, version: str | None = None) -> Blueprint:
    """The page, its files, sessions and calls. Whoever serves it authorizes by each route's policy, and asks
    `gate.signed_in` where that wants a session."""
    blueprint = Blueprint("dashboard", __name__, template_folder="templates")

    @blueprint.before_request
    def check_host() -> None:
        gate.check_host(request.environ)

    @blueprint.after_request
    def protect(response: Response) -> Response:
        for name, value in SECURITY_HEADERS.items():
            response.headers[name] = value
        return response

    _add_pages(blueprint, gate)
    _add_sessions(blueprint, gate, version)
    add_calls(blueprint, gateway, max_body_bytes)
    return blueprint


def _add_pages(blueprint: Blueprint, gate: Gate) -> None:
    @blueprint.get("/dashboard")
    @policy(public=True)
    def page() -> Response:
        """The dashboard for who is signed in, the way to sign in for others. Neither holds anything of the server."""
        signed_in = gate.session(request.environ) is not None
        response = Response(render_template("dashboard.html" if signed_in else "sign_in.html"), mimetype="text/html")
        response.headers["Cache-Control"] = "no-store"
        return response

    @blueprint.get("/dashboard/static/<path:name>")
    @policy(public=True)
    def static(name: str) -> Response:
        if not (STATIC / name).is_file():
            raise NotFoundError("There is no such file.")
        response = send_from_directory(STATIC, name)
        response.headers["Cache-Control"] = "no-cache"  # asked for again, and not sent again where nothing changed
        return response


def _add_sessions(blueprint: Blueprint, gate: Gate, version: str | None) -> None:
    @blueprint.post("/dashboard/session")
    @policy("viewer")
    def sign_in() -> Response:
        """Whoever gives the token, as any other request does, gets a session. Wrong ones are counted as elsewhere."""
        gate.check_origin(request.environ, needed=True)
        name, session = gate.sessions.begin()
        response = jsonify({"csrf": session.csrf})
        for path in COOKIE_PATHS:
            response.set_cookie(
                cookie_name(request.environ),
                name,
                path=path,
                httponly=True,
                samesite="Strict",
                secure=is_secure(request.environ),
            )
        response.headers["Cache-Control"] = "no-store"
        return response

    @blueprint.get("/dashboard/session")
    @policy("viewer", session=True)
    def session() -> Response:
        """What a page has to know before it calls anything."""
        found = gate.session(request.environ)
        response = jsonify({"csrf": found.csrf if found is not None else None, "version": version})
        response.headers["Cache-Control"] = "no-store"
        return response

    @blueprint.delete("/dashboard/session")
    @policy("viewer", session=True)
    def sign_out() -> Response:
        found = gate.session(request.environ)
        if found is not None:
            gate.sessions.end(found)
        response = Response(status=204)
        for path in COOKIE_PATHS:
            response.delete_cookie(
                cookie_name(request.environ),
                path=path,
                httponly=True,
                samesite="Strict",
                secure=is_secure(request.environ),
            )
        return response
