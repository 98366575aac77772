"""What schemathesis has to know of our server while it reads `/openapi.json`. Loaded by it, never imported."""

from __future__ import annotations

import json
import os
from typing import Any

import schemathesis

MODEL, EMBEDDING_MODEL = os.environ["CONFORMANCE_MODEL"], os.environ["CONFORMANCE_EMBEDDING_MODEL"]
ENCODING = ("embed", "rerank", "score")
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict")
TOKENS = 16


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Models are called what they are, since else every answer would be that there is none; and answers that have no
    limit have one, since the demo model goes on to the end."""
    body = case.body
    if not isinstance(body, dict):
        return
    path = case.operation.path
    if isinstance(body.get("model"), str):
        body["model"] = EMBEDDING_MODEL if any(word in path for word in ENCODING) else MODEL
    known = _names(case)
    for name in LIMITS:
        if name in known and body.get(name) is None:
            body[name] = TOKENS


def _names(case: Any) -> set[str]:
    """Fields of the body."""
    content = case.operation.definition.raw.get("requestBody", {}).get("content", {})
    reference = content.get("application/json", {}).get("schema", {}).get("$ref", "")
    schemas = case.operation.schema.raw_schema["components"]["schemas"]
    return set(schemas.get(reference.rpartition("/")[2], {}).get("properties", ()))


@schemathesis.check
def errors_are_typed(context: Any, response: Any, case: Any) -> None:
    """What is refused says what was wrong, in its API's shape."""
    if not 400 <= response.status_code < 500 or case.method == "HEAD" or not response.content:
        return
    error = json.loads(response.content)["error"]
    assert isinstance(error, str) or error["message"], f"no error that says what was wrong: {error}"
