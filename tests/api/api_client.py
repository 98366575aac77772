"""What the API's tests talk through."""

from __future__ import annotations

import json
from typing import Any

from flask import Flask
from flask.testing import FlaskClient

TOKEN = "a-token-for-tests"


class ApiClient:
    """A test client that sends the token and JSON, and reads server-sent events."""

    def __init__(self, app: Flask) -> None:
        self.raw: FlaskClient = app.test_client()
        self.headers = {"X-API-TOKEN": TOKEN}

    def get(self, path: str, **options: Any) -> Any:
        return self.raw.get(path, headers=self.headers | options.pop("headers", {}), **options)

    def post(self, path: str, body: Any = None, **options: Any) -> Any:
        if body is not None:
            options["json"] = body
        return self.raw.post(path, headers=self.headers | options.pop("headers", {}), **options)

    def delete(self, path: str) -> Any:
        return self.raw.delete(path, headers=self.headers)

    def events(self, path: str, body: dict[str, Any], **headers: str) -> list[Any]:
        """The `data:` lines of a stream, parsed; `[DONE]` stays text."""
        response = self.post(path, {**body, "stream": True}, headers=headers)
        assert response.status_code == 200, response.text
        assert response.mimetype == "text/event-stream"
        lines = [line for line in response.text.split("\n\n") if line.startswith("data: ")]
        response.close()
        data = [line.removeprefix("data: ") for line in lines]
        return [item if item == "[DONE]" else json.loads(item) for item in data]

    def error(self, path: str, body: Any = None, *, status: int, **options: Any) -> dict[str, Any]:
        """The error of a request that must fail with `status`, after checking that it has OpenAI's shape."""
        response = self.post(path, body, **options)
        assert response.status_code == status, response.text
        return openai_error(response)


def openai_error(response: Any) -> dict[str, Any]:
    assert response.mimetype == "application/json"
    assert response.headers["X-Request-ID"]
    payload = response.get_json()
    assert set(payload) == {"error"}
    error: dict[str, Any] = payload["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"]
    return error
