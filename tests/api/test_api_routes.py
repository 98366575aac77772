"""Under which paths routes answer, which headers hold the token, what browsers may send, what the log says."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from api_client import TOKEN, ApiClient, openai_error
from fake_pipeline import FakePipeline
from flask import Flask
from front_doors import serving
from werkzeug.test import EnvironBuilder

from core.api import create_app
from core.api.admission import admission_of

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}
PATHS: list[tuple[str, str, Any]] = [
    # the route, a way to write it, a body
    ("/v1/models", "/v1/models/", None),
    ("/v1/models", "/models", None),
    ("/v1/models", "/models/", None),
    ("/v1/models/<path:name>", "/v1/models/demo/", None),
    ("/v1/models/<path:name>", "/models/org/demo", None),
    ("/v1/chat/completions", "/v1/chat/completions/", CHAT),
    ("/v1/chat/completions", "/chat/completions", CHAT),
    ("/v1/chat/completions", "/chat/completions/", CHAT),
    ("/v1/completions", "/v1/completions/", {"prompt": "a"}),
    ("/v1/completions", "/completions", {"prompt": "a"}),
    ("/api/generate", "/api/generate/", {"prompt": "a"}),
    ("/live", "/live/", None),
]

each_path = pytest.mark.parametrize(("rule", "path", "body"), PATHS, ids=lambda value: str(value)[:24])


def call(client: ApiClient, path: str, body: Any) -> Any:
    return client.get(path) if body is None else client.post(path, body)


@each_path
def test_a_route_answers_however_it_is_written(client: ApiClient, rule: str, path: str, body: Any) -> None:
    plain = rule.replace("<path:name>", "org/demo" if "org" in path else "demo")
    answered, expected = call(client, path, body), call(client, plain, body)
    assert answered.status_code == 200
    variable = {"id", "created", "created_at", "timings", "total_duration", "prompt_eval_duration", "eval_duration"}
    shown = [{k: v for k, v in (item.get_json() or {}).items() if k not in variable} for item in (answered, expected)]
    assert shown[0] == shown[1]


@each_path
def test_it_counts_as_the_route_itself(
    client: ApiClient, pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch, rule: str, path: str, body: Any
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(pipeline.metrics, "observe_http", lambda path, *others: seen.append(path))
    call(client, path, body)
    assert seen == [rule]


@each_path
def test_it_is_admitted_by_its_head_as_the_route_itself(app: Flask, rule: str, path: str, body: Any) -> None:
    admit = admission_of(app)
    method = "GET" if body is None else "POST"

    def admission(path: str, **headers: str) -> Any:
        return admit(EnvironBuilder(path, method=method, headers=headers).get_environ())

    plain = rule.replace("<path:name>", "demo")
    for headers in ({"x-api-key": TOKEN}, {"X-API-TOKEN": TOKEN}, {"Authorization": f"Bearer {TOKEN}"}):
        assert admission(path, **headers).granted
        assert admission(path, **headers) == admission(plain, **headers)
    for headers in ({}, {"x-api-key": "wrong"}, {"api-key": TOKEN}):
        assert admission(path, **headers) == admission(plain, **headers)
        assert admission(path, **headers).granted is (rule == "/live")


@pytest.mark.parametrize("path", ["/batch/completions", "/generate", "/v1/v1/models", "/v1/models//x/", "/model"])
def test_no_other_path_appeared(client: ApiClient, path: str) -> None:
    assert client.get(path).status_code in (308, 404)


def test_a_stranger_learns_nothing_from_the_short_paths(app: Flask) -> None:
    for path in ("/models", "/models/demo", "/v1/models/"):
        assert app.test_client().get(path).status_code == 401


def test_openais_client_without_the_prefix_in_its_address(app: Flask) -> None:
    with serving(app) as port, openai.OpenAI(base_url=f"http://127.0.0.1:{port}", api_key=TOKEN) as client:
        assert [model.id for model in client.models.list()] == ["demo", "org/demo"]
        answer = client.chat.completions.create(model="demo", messages=CHAT["messages"])  # type: ignore[call-overload]
        assert answer.choices[0].message.content == "Hello"
        assert client.completions.create(model="demo", prompt="a").choices[0].text == "Hello"


def test_a_body_is_read_for_x_api_key_alone(app: Flask) -> None:
    with serving(app) as port:
        address, headers = f"http://127.0.0.1:{port}/v1", {"x-api-key": TOKEN}
        with openai.OpenAI(base_url=address, api_key="of another service", default_headers=headers) as client:
            assert client.completions.create(model="demo", prompt="a" * 300).choices[0].text == "Hello"


def test_openais_client_finds_a_model_that_is_called_by_its_path(app: Flask, pipeline: FakePipeline) -> None:
    path = str(pipeline.model.path)
    with serving(app) as port, openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=TOKEN) as client:
        assert client.models.retrieve(path).root == "demo"  # type: ignore[attr-defined]
        answer = client.chat.completions.create(model=path, messages=CHAT["messages"])  # type: ignore[call-overload]
        assert answer.model == path


# ---- CORS --------------------------------------------------------------------------------------------------------

SENT_BY_BROWSERS = (
    "authorization", "content-type", "x-api-key", "x-stainless-lang", "x-stainless-helper-method",
    "openai-organization", "openai-beta", "anthropic-version", "anthropic-dangerous-direct-browser-access",
)  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat/completions/", "/v1/models"])
def test_a_browsers_client_may_send_its_headers(make_pipeline: Callable[..., FakePipeline], path: str) -> None:
    app = create_app(make_pipeline(api__cors_origins=("https://app.example",)))  # type: ignore[arg-type]
    asked = ", ".join((*SENT_BY_BROWSERS, "cookie", "x-stainless", "not-openai-x"))
    headers = {
        "Origin": "https://app.example", "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": asked,
    }  # fmt: skip
    preflight = app.test_client().options(path, headers=headers)
    assert preflight.status_code == 200
    allowed = preflight.headers["Access-Control-Allow-Headers"].lower().split(", ")
    assert sorted(allowed) == sorted(SENT_BY_BROWSERS)


# ---- the log -----------------------------------------------------------------------------------------------------


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[Any]]]:
    """What has been logged so far."""
    with caplog.at_level(logging.DEBUG):
        yield lambda: [record.msg for record in caplog.records if isinstance(record.msg, dict)]


def refusal(lines: list[Any]) -> Any:
    (line,) = [line for line in lines if line["event"] == "request refused"]
    return line


SECRET = "the moon is made of cheese"
REFUSALS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("/v1/completions", {"prompt": SECRET, "n": 0}, {"status": 400, "code": None, "param": "n"}),
    ("/v1/completions", {"prompt": SECRET, "regex": SECRET}, {"status": 400, "code": "unsupported_parameter"}),
    ("/v1/completions", {"prompt": {SECRET: 1}}, {"status": 400, "param": "prompt"}),
    ("/v1/completions", {"prompt": SECRET, "model": "x"}, {"status": 404, "code": "model_not_found"}),
    ("/v1/completions", {"prompt": SECRET * 20}, {"status": 400, "code": "context_length_exceeded"}),
    ("/v1/chat/completions", {"messages": [{"role": SECRET}]}, {"status": 400, "param": "messages[0].role"}),
    ("/v1/nothing", {"prompt": SECRET}, {"status": 404, "code": "not_found", "asked": "/v1/nothing"}),
    ("/v1/models", {"prompt": SECRET}, {"status": 405, "code": "method_not_allowed"}),
]


@pytest.mark.parametrize(("path", "body", "said"), REFUSALS, ids=lambda value: str(value)[:40])
def test_the_log_says_why_a_request_was_refused(
    client: ApiClient, lines: Any, path: str, body: dict[str, Any], said: dict[str, Any]
) -> None:
    message = openai_error(client.post(path, body))["message"]
    line = refusal(lines())
    assert line["level"] == "info"
    assert line["reason"] == message.removesuffix(" (context_length_exceeded)")
    assert {name: line[name] for name in said} == said
    assert SECRET not in str(lines())
    assert TOKEN not in str(lines())


def test_the_log_does_not_quote_a_template(client: ApiClient, lines: Any) -> None:
    body = {"messages": [{"role": "user", "content": SECRET}, {"role": "tool", "content": SECRET}]}
    error = client.error("/v1/chat/completions", body, status=400)
    assert error["message"] == "The template knows no tools."
    line = refusal(lines())
    assert (line["code"], line["param"], line["reason"]) == ("chat_template_error", "messages", None)


def test_a_wrong_token_is_not_logged(client: ApiClient, lines: Any) -> None:
    client.get("/v1/models", headers={"X-API-TOKEN": "nearly-the-token", "x-api-key": "another"})
    line = refusal(lines())
    assert (line["status"], line["code"], line["reason"]) == (401, "invalid_api_key", "The API token is wrong.")
    assert "nearly-the-token" not in str(lines())


def test_a_clients_names_cannot_write_log_lines(client: ApiClient, lines: Any) -> None:
    client.post("/v1/completions", {"prompt": "a", "model": "x\nrequest answered \x1b[2J" + "y" * 4000})
    line = refusal(lines())
    assert line["reason"].isprintable()
    assert len(line["reason"]) < 400


@pytest.mark.parametrize(("path", "logged"), [("/api/pipeline/status", False), ("/live", False), ("/api/models", True)])
def test_what_dashboards_ask_every_second_is_logged_for_debugging_alone(
    client: ApiClient, lines: Callable[[], list[Any]], path: str, logged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    client.get(path)
    levels = [
        record.levelno
        for record in caplog.records
        if isinstance(record.msg, dict) and record.msg["event"] == "request answered"
    ]
    assert levels == [logging.INFO if logged else logging.DEBUG]


def test_what_dashboards_are_refused_is_logged(client: ApiClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        client.get("/api/memory?blocks=many")
    assert [record for record in caplog.records if isinstance(record.msg, dict) and record.msg.get("status") == 400]
