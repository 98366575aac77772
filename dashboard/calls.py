"""What the dashboard's pages may call of the API, and passing it on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from flask import Blueprint, Response, request

from core.errors import PayloadTooLargeError
from core.security.access import Role, policy
from core.security.admission import DISCONNECTED_KEY
from dashboard.gateway import ApiAnswer, ApiCall, ApiGateway

PREFIX = "/dashboard/call"


@dataclass(frozen=True, slots=True)
class Passed:
    """A route of the API, with the policy that it has there."""

    method: str
    rule: str
    role: Role
    mutates: bool = False


CALLS = (
    Passed("GET", "/v1/models", "viewer"),
    Passed("POST", "/v1/chat/completions", "user"),
    Passed("GET", "/api/models", "viewer"),
    Passed("POST", "/api/models/load", "operator", mutates=True),
    Passed("POST", "/api/models/unload", "operator", mutates=True),
    Passed("POST", "/api/pipeline/place", "operator", mutates=True),
    Passed("POST", "/api/requests/<request_id>/cancel", "user", mutates=True),
    Passed("POST", "/api/memory/blocks/<block>/promote", "operator", mutates=True),
    Passed("POST", "/api/memory/blocks/<block>/demote", "operator", mutates=True),
    Passed("POST", "/api/memory/reclaim", "operator", mutates=True),
    Passed("POST", "/api/memory/lend", "operator", mutates=True),
)
"""All that is passed on; what only reads the state comes with the live data."""


def add_calls(blueprint: Blueprint, gateway: ApiGateway, max_body_bytes: int) -> None:
    """A route of `blueprint` for each of `CALLS`."""
    for passed in CALLS:
        view = policy(passed.role, mutates=passed.mutates, waits=True, session=True)(_view(gateway, max_body_bytes))
        endpoint = f"call_{passed.method}_{passed.rule}".replace(".", "_")
        blueprint.add_url_rule(PREFIX + passed.rule, endpoint, view, methods=[passed.method])


def _view(gateway: ApiGateway, max_body_bytes: int) -> Callable[..., Response]:
    def pass_on(**_: str) -> Response:
        if (request.content_length or 0) > max_body_bytes:
            raise PayloadTooLargeError(f"The body has more than the {max_body_bytes} bytes that this server accepts.")
        call = ApiCall(
            request.method,
            request.path.removeprefix(PREFIX),
            request.query_string.decode("latin-1"),
            request.get_data(cache=False) if request.method == "POST" else b"",
            request.environ.get(DISCONNECTED_KEY, lambda: False),
        )
        answer = gateway.call(call)
        response = Response(_closing(answer), answer.status, dict(answer.headers))
        response.headers["Cache-Control"] = "no-store"
        response.call_on_close(answer.close)
        return response

    return pass_on


def _closing(answer: ApiAnswer) -> Iterator[bytes]:
    try:
        yield from answer.pieces
    finally:
        answer.close()
