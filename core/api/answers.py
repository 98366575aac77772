"""JSON answers."""

from __future__ import annotations

import json
from typing import Any

from flask import Response


def to_json(payload: Any) -> str:
    """Compact JSON. Raises ValueError for NaN and infinity, which JSON does not have."""
    return json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def json_response(payload: Any, status: int = 200) -> Response:
    return Response(to_json(payload) + "\n", status=status, mimetype="application/json")
