"""Ollama's API: lines, whole answers, what the model is shown, and `/api/generate` in both manners."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
from api_client import ApiClient
from fake_pipeline import BOS, CONTEXT, GRAMMARS, FakePipeline
from flask import Flask

from core.errors import StepFailedError
from core.parsers.families import OutputFormat

URL = "/api/chat"
USER = {"role": "user", "content": "a"}
BODY: dict[str, Any] = {"model": "demo", "messages": [USER]}
WHOLE = BODY | {"stream": False}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
EVERYTHING = f"<think>hm</think>\n\nLet me see.\n{CALL}\n{CALL}"
TOTALS = {
    "total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration",
    "done_reason",
}  # fmt: skip


Shown = list[tuple[list[dict[str, Any]], dict[str, Any]]]


@pytest.fixture
def shown(thinker: FakePipeline, monkeypatch: pytest.MonkeyPatch) -> Shown:
    """The messages and the options that the template was given."""
    seen: Shown = []

    def encode_chat(messages: list[dict[str, Any]], **options: Any) -> list[int]:
        seen.append((messages, options))
        return [97]

    monkeypatch.setattr(thinker.model.tokenizer, "encode_chat", encode_chat)
    return seen


def lines(client: ApiClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = client.post(path, body)
    assert response.status_code == 200, response.text
    assert response.mimetype == "application/x-ndjson"
    found = [json.loads(line) for line in response.text.splitlines()]
    response.close()
    return found


def joined(found: list[dict[str, Any]]) -> dict[str, Any]:
    message: dict[str, Any] = {"content": "", "thinking": "", "tool_calls": []}
    for line in found:
        message["content"] += line["message"]["content"]
        message["thinking"] += line["message"].get("thinking", "")
        message["tool_calls"] += line["message"].get("tool_calls", [])
    return message


# ---- /api/chat ---------------------------------------------------------------------------------------------------


def test_an_answer_comes_in_lines(client: ApiClient) -> None:
    *chunks, last = lines(client, URL, BODY)
    assert joined(chunks)["content"] == "Hello"
    assert [line["done"] for line in chunks] == [False] * 5
    assert (last["done"], last["done_reason"], last["eval_count"], last["prompt_eval_count"]) == (True, "stop", 5, 7)
    assert set(last) == {"model", "created_at", "message", "done"} | TOTALS
    assert last["message"] == {"role": "assistant", "content": ""}
    assert datetime.fromisoformat(last["created_at"].replace("Z", "+00:00")).tzinfo is not None
    assert last["total_duration"] >= last["prompt_eval_duration"] > 0


def test_or_whole(client: ApiClient) -> None:
    answer = client.post(URL, WHOLE).get_json()
    assert answer["message"] == {"role": "assistant", "content": "Hello"}
    assert set(answer) == {"model", "created_at", "message", "done"} | TOTALS


def test_or_as_events_for_who_asks_for_them(client: ApiClient) -> None:
    events = client.events(URL, BODY, Accept="text/event-stream")
    assert joined(events[:-1])["content"] == "Hello"
    assert events[-1] == "[DONE]"


def test_thoughts_and_calls(client: ApiClient, thinker: FakePipeline) -> None:
    thinker.reply = EVERYTHING
    body = BODY | {"tools": [WEATHER]}
    message = joined(lines(client, URL, body))
    assert message["thinking"] == "hm"
    assert message["content"].strip() == "Let me see."
    calls = [call["function"] for call in message["tool_calls"]]
    assert calls == [{"index": index, "name": "weather", "arguments": {"city": "Oslo"}} for index in range(2)]
    whole = client.post(URL, body | {"stream": False}).get_json()["message"]
    for call in (*whole["tool_calls"], *message["tool_calls"]):
        call.pop("id")
    assert whole == {"role": "assistant", **message}


def test_log_probabilities(client: ApiClient) -> None:
    body = WHOLE | {"logprobs": True, "top_logprobs": 2}
    entries = client.post(URL, body).get_json()["logprobs"]
    assert [entry["token"] for entry in entries] == list("Hello")
    streamed = [entry for line in lines(client, URL, body | {"stream": True}) for entry in line.get("logprobs", ())]
    assert streamed == entries
    assert "logprobs" not in client.post(URL, WHOLE).get_json()


def test_options_reach_the_engine(client: ApiClient, pipeline: FakePipeline) -> None:
    options = {
        "temperature": 0.5, "top_k": 7, "top_p": 0.25, "min_p": 0.1, "seed": 3, "stop": ["x"], "num_predict": 4,
        "repeat_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.25, "num_ctx": 64, "mirostat": 0,
    }  # fmt: skip
    assert client.post(URL, WHOLE | {"options": options}).get_json()["done_reason"] == "length"
    params = pipeline.submitted[0][1]
    assert (params.temperature, params.top_k, params.top_p, params.min_p, params.seed) == (0.5, 7, 0.25, 0.1, 3)
    assert (params.stop, params.max_tokens, params.repetition_penalty) == (("x",), 4, 1.5)
    assert (params.presence_penalty, params.frequency_penalty) == (0.5, 0.25)
    for num_predict in (-1, -2, 10 * CONTEXT):
        client.post(URL, WHOLE | {"options": {"num_predict": num_predict}})
        prompt, params = pipeline.submitted[-1]
        assert params.max_tokens == CONTEXT - len(prompt)


def test_a_conversation_is_the_same_in_the_templates_words(client: ApiClient, shown: Shown) -> None:
    calls = [{"function": {"name": name, "arguments": {"city": "Oslo"}}} for name in ("weather", "now")]
    messages = [
        {"role": "system", "content": "Be brief."}, USER,
        {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": calls},
        {"role": "tool", "content": "noon", "tool_name": "now"},
        {"role": "tool", "content": "rain", "tool_name": "weather"},
    ]  # fmt: skip
    assert client.post(URL, WHOLE | {"messages": messages, "tools": [WEATHER], "think": None}).status_code == 200
    given, options = shown[0]
    assert [message["role"] for message in given] == ["system", "user", "assistant", "tool", "tool"]
    assert given[2]["reasoning_content"] == "hm"
    ids = [call["id"] for call in given[2]["tool_calls"]]
    assert [message["tool_call_id"] for message in given[3:]] == [ids[1], ids[0]], "results find their calls"
    assert given[2]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
    assert [tool["function"]["name"] for tool in options["tools"]] == ["weather"]


def test_thinking_is_switched_where_the_template_can(
    client: ApiClient, shown: Shown, thinker: FakePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = client.post(URL, WHOLE | {"think": False})
    assert (refused.status_code, "always thinks" in refused.get_json()["error"]) == (400, True)
    monkeypatch.setattr(thinker.model.tokenizer, "template_variables", frozenset({"messages", "enable_thinking"}))
    for wanted in (True, False):
        assert client.post(URL, WHOLE | {"think": wanted}).status_code == 200
        assert shown[-1][1]["chat_template_kwargs"] == {"enable_thinking": wanted}
    monkeypatch.setattr(thinker.model.tokenizer, "template_variables", frozenset({"messages", "reasoning_effort"}))
    assert client.post(URL, WHOLE | {"think": "low"}).status_code == 200
    assert shown[-1][1]["chat_template_kwargs"] == {"reasoning_effort": "low"}


def test_without_messages_the_model_is_loaded_already(client: ApiClient) -> None:
    for extra in ({}, {"messages": []}):
        answer = client.post(URL, {"model": "demo:latest", **extra}).get_json()
        assert (answer["done"], answer["done_reason"]) == (True, "load")
    assert client.post(URL, {"model": "x"}).status_code == 404


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"model": None}, "model"),
        ({"messages": [{"role": "user", "content": "a", "images": ["x"]}]}, "images"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
        ({"options": {"temperature": 5}}, "options.temperature"),
        ({"options": {"temperature": "hot"}}, "options.temperature"),
        ({"options": {"mirostat": 1}}, "mirostat"),
        ({"options": {"repeat_penalty": 0}}, "options.repeat_penalty"),
        ({"options": {"num_predict": 0}}, "options.num_predict"),
        ({"think": True}, "does not support thinking"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"messages": [{"role": "user", "content": "a" * CONTEXT}]}, "context"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_said_in_ollamas_shape(
    client: ApiClient, pipeline: FakePipeline, extra: dict[str, Any], named: str
) -> None:
    pipeline.fake_model = replace(pipeline.model, output_format=OutputFormat("hermes", None))
    response = client.post(URL, WHOLE | extra)
    assert response.status_code == 400, response.text
    payload = response.get_json()
    assert set(payload) == {"error"}
    assert named in payload["error"]
    assert not pipeline.submitted


@pytest.mark.parametrize("path", [URL, "/api/embed", "/api/generate"])
def test_options_that_are_not_honoured_are_refused_wherever_there_are_options(client: ApiClient, path: str) -> None:
    body = {"model": "demo", "messages": WHOLE["messages"], "input": "a", "prompt": "a", "options": {"mirostat": 1}}
    if path == "/api/generate":
        del body["messages"], body["input"]
    response = client.post(path, body)
    assert response.status_code == 400, response.text
    assert "mirostat" in response.text


def test_a_stream_that_fails_ends_with_an_error(client: ApiClient, pipeline: FakePipeline) -> None:
    pipeline.failing = {0: StepFailedError("The step failed.")}
    assert lines(client, URL, BODY)[-1] == {"error": "The step failed."}


def test_strangers_are_told_in_ollamas_shape(app: Flask) -> None:
    for path in ("/api/tags", "/api/ps", "/api/version"):
        response = app.test_client().get(path)
        assert response.status_code == 401
        assert isinstance(response.get_json()["error"], str)


# ---- the models --------------------------------------------------------------------------------------------------


def test_the_model_is_listed_shown_and_loaded(client: ApiClient, pipeline: FakePipeline) -> None:
    pipeline.fake_model = replace(pipeline.model, output_format=OutputFormat("hermes", "think"))
    (listed,) = client.get("/api/tags").get_json()["models"]
    assert (listed["name"], listed["model"], listed["size"]) == ("demo", "demo", 4000)
    assert listed["details"]["parameter_size"] == "1.0K"
    assert listed["details"]["quantization_level"] == "F32"
    (loaded,) = client.get("/api/ps").get_json()["models"]
    assert (loaded["digest"], loaded["size_vram"], loaded["context_length"]) == (listed["digest"], 0, CONTEXT)
    for body in ({"model": "demo"}, {"name": "demo:latest"}):
        about = client.post("/api/show", body).get_json()
        assert about["capabilities"] == ["completion", "tools", "thinking"]
        family = about["details"]["family"]
        assert about["model_info"]["general.architecture"] == family
        assert about["model_info"][f"{family}.context_length"] == CONTEXT
        assert about["template"]
    assert client.post("/api/show", {}).status_code == 400
    assert client.post("/api/show", {"model": "x"}).status_code == 404
    assert client.get("/api/version").get_json() == {"version": "0.0.0"}
    pipeline.fake_model = None
    assert client.get("/api/tags").get_json() == client.get("/api/ps").get_json() == {"models": []}


# ---- /api/generate -----------------------------------------------------------------------------------------------

GENERATE = "/api/generate"


def test_one_answer_is_ours_and_ollamas(client: ApiClient) -> None:
    answer = client.post(GENERATE, {"model": "demo", "prompt": "a"}).get_json()
    assert (answer["response"], answer["outputs"][0]["text"], answer["done"]) == ("Hello", "Hello", True)
    assert set(answer) >= TOTALS
    assert (answer["eval_count"], answer["usage"]["completion_tokens"]) == (5, 5)


def test_a_stream_is_lines_unless_events_are_asked_for(client: ApiClient) -> None:
    body = {"prompt": "a", "stream": True}
    *chunks, last = lines(client, GENERATE, body)
    assert "".join(chunk["response"] for chunk in chunks) == "".join(chunk["text"] for chunk in chunks) == "Hello"
    assert [chunk["done"] for chunk in (*chunks, last)] == [False] * len(chunks) + [True]
    assert (last["response"], last["done_reason"]) == ("", "stop")
    *events, done = client.events(GENERATE, body, Accept="text/event-stream")
    assert done == "[DONE]"
    assert "".join(event.get("response", "") for event in events) == "Hello"
    *accepted, _ = client.events(GENERATE, body, Accept="application/json;q=0.5, text/event-stream")
    assert len(accepted) == len(events)


@pytest.mark.parametrize(
    ("extra", "prompt"),
    [
        ({}, [BOS, *b"a"]),
        ({"raw": True}, [BOS, *b"a"]),
        ({"raw": False}, [BOS, *b"u:a\na:"]),
        ({"options": {}}, [BOS, *b"u:a\na:"]),
        ({"system": "b"}, [BOS, *b"s:b\nu:a\na:"]),
        ({"keep_alive": "5m", "format": "", "context": [], "template": "", "images": []}, [BOS, *b"u:a\na:"]),
    ],
    ids=str,
)
def test_with_ollamas_fields_the_prompt_is_a_message(
    client: ApiClient, pipeline: FakePipeline, extra: dict[str, Any], prompt: list[int]
) -> None:
    assert (
        client.post(GENERATE, {"model": "demo:latest" if extra else "demo", "prompt": "a", **extra}).status_code == 200
    )
    assert pipeline.submitted[0][0] == prompt


def test_thoughts_are_apart_there(client: ApiClient, thinker: FakePipeline) -> None:
    thinker.reply = "<think>hm</think>Hello"
    body = {"prompt": "a", "options": {"num_predict": 10_000, "temperature": 0.5}}
    answer = client.post(GENERATE, body).get_json()
    assert (answer["response"], answer["thinking"]) == ("Hello", "hm")
    assert answer["outputs"][0]["text"] == thinker.reply
    prompt, params = thinker.submitted[0]
    assert (params.max_tokens, params.temperature) == (CONTEXT - len(prompt), 0.5)
    streamed = lines(client, GENERATE, body | {"stream": True})
    assert "".join(line["response"] for line in streamed) == "Hello"
    assert "".join(line.get("thinking", "") for line in streamed) == "hm"
    assert client.post(GENERATE, {"prompt": "a"}).get_json()["response"] == thinker.reply


def test_without_a_prompt_the_model_is_loaded_already(client: ApiClient) -> None:
    answer = client.post(GENERATE, {"model": "demo", "keep_alive": -1}).get_json()
    assert (answer["response"], answer["done"], answer["done_reason"]) == ("", True, "load")


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"suffix": "b"}, "suffix"),
        ({"context": [1]}, "context"),
        ({"format": "xml"}, None),
        ({"format": {"not": {}}}, "format"),
        ({"images": ["x"]}, "images"),
        ({"options": {"temperature": 5}}, "options.temperature"),
        ({"options": {"typical_p": 0.5}}, "typical_p"),
        ({"think": True}, "think"),
    ],
)
def test_what_is_not_available_there_is_refused(client: ApiClient, extra: dict[str, Any], param: str | None) -> None:
    error = client.error(GENERATE, {"prompt": "a", **extra}, status=400)
    assert error["param"] == param or param is None


@pytest.mark.parametrize("form", ["json", {"type": "object"}])
def test_forms_are_kept_to(client: ApiClient, pipeline: FakePipeline, form: Any) -> None:
    assert client.post(URL, BODY | {"format": form}).status_code == 200
    assert pipeline.submitted[-1][1].grammar is not None


@pytest.mark.parametrize(
    ("extra", "prompt"),
    [({}, b"u:a\na:"), ({"raw": True}, b"a")],
)
@pytest.mark.parametrize("form", ["json", {"type": "object"}])
def test_forms_are_kept_to_by_generate(
    client: ApiClient, pipeline: FakePipeline, extra: dict[str, Any], prompt: bytes, form: Any
) -> None:
    """`format` alone makes the prompt a message, as with Ollama."""
    assert client.post(GENERATE, {"model": "demo", "prompt": "a", "format": form, **extra}).status_code == 200
    given, params = pipeline.submitted[-1]
    assert given == [BOS, *prompt]
    matcher = GRAMMARS.matcher(params.grammar)
    assert matcher.validate_tokens(list(b'{"a": 1}')) == 8
    assert matcher.validate_tokens(list(b"Hello")) == 0


def test_thoughts_come_before_the_form(client: ApiClient, thinker: FakePipeline) -> None:
    thinker.reply = '<think>hm</think>{"a": 1}'
    answer = client.post(GENERATE, {"prompt": "a", "format": "json"}).get_json()
    assert (answer["thinking"], answer["response"]) == ("hm", '{"a": 1}')
    matcher = GRAMMARS.matcher(thinker.submitted[-1][1].grammar)
    assert matcher.validate_tokens(list(thinker.reply.encode())) == len(thinker.reply)
