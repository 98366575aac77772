"""`GET /openapi.json` and `/docs`. Public: they say what every copy of the program says, and the version, as `/`
does."""

from __future__ import annotations

import secrets
from itertools import groupby
from typing import Any, cast

from flask import Blueprint, Response, current_app, render_template

from core.api.body import UNSUPPORTED, to_json
from core.api.context import api_context
from core.api.front import protected
from core.api.openapi.document import JSON, SCHEMA_REF, document
from core.security.access import policy

blueprint = Blueprint("openapi", __name__)
KEPT = "vramancer_openapi"


def _document() -> dict[str, Any]:
    """Made once: routes do not change while the program runs."""
    kept = current_app.extensions
    if KEPT not in kept:
        kept[KEPT] = document(current_app, api_context().version)
    return cast("dict[str, Any]", kept[KEPT])


@blueprint.get("/openapi.json")
@policy(public=True)
def openapi() -> Response:
    """Every route, as OpenAPI 3.1."""
    return Response(to_json(_document()) + "\n", mimetype="application/json")


@blueprint.get("/docs")
@policy(public=True)
def docs() -> Response:
    """The same as a page, which runs and loads nothing."""
    shown = _document()
    rows = [
        {**operation, "tag": operation["tags"][0], "path": path, "method": method.upper(), "body": _fields(operation)}
        for path, methods in shown["paths"].items()
        for method, operation in methods.items()
    ]
    rows.sort(key=lambda row: (row["tag"], row["path"], row["method"]))
    groups = [(tag, list(found)) for tag, found in groupby(rows, key=lambda row: row["tag"])]
    nonce = secrets.token_urlsafe(16)
    page = render_template("docs.html", groups=groups, version=shown["info"]["version"], nonce=nonce)
    return protected(Response(page, mimetype="text/html"), nonce)


def _fields(operation: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The fields of a body, without those that are not supported; required are those that each of its schemas does."""
    if "requestBody" not in operation:
        return {}
    shown = operation["requestBody"]["content"][JSON]["schema"]
    components = _document()["components"]["schemas"]
    schemas = [components[each["$ref"].removeprefix(SCHEMA_REF)] for each in shown.get("anyOf", [shown])]
    return {
        name: {"type": _named(field), "required": all(name in schema.get("required", ()) for schema in schemas)}
        for fields in reversed(schemas)
        for name, field in fields["properties"].items()
        if field.get("description") != UNSUPPORTED
    }


def _named(field: dict[str, Any]) -> str:
    """A field's type in a few words."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_named(item) for item in field["anyOf"] if item.get("type") != "null"))
    if "enum" in field:
        return ", ".join(map(str, field["enum"]))
    return str(field.get("type") or field.get("$ref", "anything").rpartition("/")[2])
