"""What the server in front asks of the application before it reads a body or gives a request a thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from flask import Flask
from werkzeug.exceptions import HTTPException

from core.api.context import EXTENSION
from core.errors import VRAMancerError
from core.security.access import authorize, given_tokens, policy_of
from core.security.admission import REFUSED, Admission

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment


def admission_of(app: Flask) -> Callable[[WSGIEnvironment], Admission]:
    """The function that judges a request of `app` by its head. It allocates nothing, and raises nothing."""
    context = app.extensions[EXTENSION]
    read_only = context.pipeline.settings.security.read_only

    def admit(environ: WSGIEnvironment) -> Admission:
        method = environ["REQUEST_METHOD"]
        try:
            endpoint, _ = app.url_map.bind_to_environ(environ).match()
        except HTTPException:
            return REFUSED
        declared = policy_of(app.view_functions[endpoint])
        try:
            authorize(
                declared,
                method,
                given_tokens(environ),
                context.token,
                read_only=read_only,
                signed_in=lambda: context.signed_in(environ),
            )
        except VRAMancerError:
            return REFUSED
        if declared is None:
            return REFUSED
        return Admission(
            granted=True,
            waits=declared.waits,
            manages=declared.mutates,
            public=declared.role is None or method == "OPTIONS",
        )

    return admit
