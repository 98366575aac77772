"""What schemathesis has to know of our server while it reads OpenAI's specification. Loaded by it, never imported."""

from __future__ import annotations

import json
import os
import threading
import zlib
from pathlib import Path
from typing import Any

import jsonschema
import openai_spec
import schemathesis

MODELS = {"/embeddings": os.environ["CONFORMANCE_EMBEDDING_MODEL"]}
MODEL = os.environ["CONFORMANCE_MODEL"]
DOCUMENT = json.loads(Path(os.environ["CONFORMANCE_SPEC"]).read_text(encoding="utf-8"))
LIMITS = {"/chat/completions": "max_completion_tokens", "/completions": "max_tokens", "/responses": "max_output_tokens"}
TOKENS = 16
DROPPED = {
    "/chat/completions": ("audio", "function_call", "functions", "modalities", "moderation", "web_search_options"),
    "/responses": ("context_management", "conversation", "moderation", "prompt"),
}
"""What is refused is sent in one request of eight alone: in all of them, nothing else would be tried."""
ONE_IN = 8
WRITING = threading.Lock()


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """The model is ours, and an answer without a limit has one, since the demo model goes on to the end."""
    path = case.operation.path
    if path == "/models/{model}" and "model" in (case.path_parameters or {}):
        case.path_parameters["model"] = MODEL
    body = case.body
    if not isinstance(body, dict) or case.method != "POST":
        return
    if zlib.crc32(repr(body).encode()) % ONE_IN:
        for name in DROPPED.get(path, ()):
            body.pop(name, None)
    if isinstance(body.get("model"), str):
        body["model"] = MODELS.get(path, MODEL)
    limit = LIMITS.get(path)
    if limit is not None and not any(isinstance(body.get(name), int) for name in (limit, "max_tokens")):
        body[limit] = TOKENS


def validator(name: str) -> jsonschema.Draft202012Validator:
    schema = {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}
    return jsonschema.Draft202012Validator(schema)


VALIDATORS = {path: validator(name) for path, name in openai_spec.EVENTS.items()}


@schemathesis.check
def events_conform(context: Any, response: Any, case: Any) -> None:
    """Each event of a stream is one that the specification knows."""
    if "text/event-stream" not in (response.headers.get("content-type") or [""])[0]:
        return
    lines = [line[6:] for line in response.content.decode().splitlines() if line.startswith("data: ")]
    assert lines, "a stream without events"
    path = case.operation.path
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    if path != "/responses":
        assert lines[-1] == "[DONE]" or "error" in events[-1], "a stream that ends in the middle"
    for event in events:
        if "error" in event and "type" not in event:
            note(case, 200, event["error"])
            continue
        error = jsonschema.exceptions.best_match(VALIDATORS[path].iter_errors(event))
        assert error is None, (
            f"{event.get('type', '')} {error.json_path}: {error.message[:300]} in {json.dumps(event)[:600]}"
        )


@schemathesis.check
def refusals_are_typed(context: Any, response: Any, case: Any) -> None:
    """What is refused has OpenAI's error."""
    if not 400 <= response.status_code < 500:
        return
    error = json.loads(response.content)["error"]
    assert {"message", "type", "param", "code"} <= set(error), f"no error of OpenAI's shape: {error}"
    note(case, response.status_code, error)


def note(case: Any, status: int, error: dict[str, Any]) -> None:
    """Remember a refusal, with what was sent, for the list of what is refused."""
    meta = case.meta
    positive = meta is not None and meta.generation.mode.is_positive
    line = {
        "path": case.operation.path, "method": case.method, "status": status, "positive": positive, **error,
        "body": repr(case.body)[:2000],
    }  # fmt: skip
    with WRITING, Path(os.environ["CONFORMANCE_REFUSALS"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, default=str) + "\n")
