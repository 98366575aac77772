"""Anthropic's Messages API: what the model is shown, answers whole and in events, errors in its shape."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import pytest
from api_client import TOKEN, ApiClient
from fake_pipeline import CONTEXT, FakePipeline
from flask import Flask

from core.api.openai.tools import MAX_TOOLS
from core.api.translated import AnswerPieces, Call
from core.errors import QueueFullError, StepFailedError
from core.parsers.events import Text
from core.parsers.families import OutputFormat

URL = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
USER = {"role": "user", "content": "a"}
WEATHER = {"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}
BODY: dict[str, Any] = {"model": "demo", "max_tokens": 400, "messages": [USER]}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
EVERYTHING = f"<think>hm</think>\n\nLet me see.\n{CALL}\n{CALL}"


def family(pipeline: FakePipeline, tool_parser: str | None = "hermes", reasoning_parser: str | None = "think") -> None:
    pipeline.fake_model = replace(pipeline.model, output_format=OutputFormat(tool_parser, reasoning_parser))


Shown = list[tuple[list[dict[str, Any]], dict[str, Any]]]


@pytest.fixture
def shown(thinker: FakePipeline, monkeypatch: pytest.MonkeyPatch) -> Shown:
    """The messages and the options that the template was given."""
    seen: Shown = []

    def encode_chat(messages: list[dict[str, Any]], **options: Any) -> list[int]:
        seen.append((messages, options))
        return [97, 98]

    monkeypatch.setattr(thinker.model.tokenizer, "encode_chat", encode_chat)
    return seen


def events(client: ApiClient, body: dict[str, Any]) -> list[dict[str, Any]]:
    """A stream's events; each is named by its type."""
    response = client.post(URL, body | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.mimetype == "text/event-stream"
    found = []
    for text in response.text.split("\n\n")[:-1]:
        name, data = text.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def assembled(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream's events make, as Anthropic's clients put it together."""
    message: dict[str, Any] = found[0]["message"]
    for event in found:
        if event["type"] == "content_block_start":
            assert event["index"] == len(message["content"])
            message["content"].append(dict(event["content_block"]))
            pieces = ""
        elif event["type"] == "content_block_delta":
            assert event["index"] == len(message["content"]) - 1
            block, delta = message["content"][-1], event["delta"]
            if delta["type"] == "input_json_delta":
                pieces += delta["partial_json"]
                continue
            name = delta["type"].removesuffix("_delta")
            block[name] += delta[name]
        elif event["type"] == "content_block_stop" and message["content"][-1]["type"] == "tool_use":
            message["content"][-1]["input"] = json.loads(pieces)
        elif event["type"] == "message_delta":
            message |= event["delta"]
            message["usage"] |= event["usage"]
    return message


def anthropic_error(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    payload = response.get_json()
    assert set(payload) == {"type", "error"} and payload["type"] == "error"
    assert response.headers["request-id"] == response.headers["X-Request-ID"]
    error: dict[str, Any] = payload["error"]
    assert error["message"]
    return error


# ---- answers -----------------------------------------------------------------------------------------------------


def test_a_message_is_text(client: ApiClient) -> None:
    response = client.post(URL, BODY, headers={"anthropic-version": "2023-06-01", "anthropic-beta": "x"})
    message = response.get_json()
    assert message.pop("id").startswith("msg_")
    assert message == {
        "type": "message", "role": "assistant", "model": "demo", "content": [{"type": "text", "text": "Hello"}],
        "stop_reason": "end_turn", "stop_sequence": None,
        "usage": {
            "input_tokens": 6, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 1, "output_tokens": 5,
        },
    }  # fmt: skip
    assert response.headers["request-id"] == response.headers["X-Request-ID"]


def test_events_come_in_their_order(client: ApiClient) -> None:
    found = events(client, BODY)
    assert [event["type"] for event in found] == [
        "message_start", "ping", "content_block_start", *["content_block_delta"] * 5, "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    assert found[0]["message"]["usage"]["output_tokens"] == 0
    assert found[2] == {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    assert found[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert found[-2]["usage"]["output_tokens"] == 5


def test_thoughts_text_and_calls_are_blocks(client: ApiClient, thinker: FakePipeline) -> None:
    thinker.reply = EVERYTHING
    body = BODY | {"tools": [WEATHER]}
    message = client.post(URL, body).get_json()
    assert [block["type"] for block in message["content"]] == ["thinking", "text", "tool_use", "tool_use"]
    thinking, text, call, other = message["content"]
    assert (thinking["thinking"], bool(thinking["signature"])) == ("hm", True)
    assert text["text"].strip() == "Let me see."
    assert call == {"type": "tool_use", "id": call["id"], "name": "weather", "input": {"city": "Oslo"}}
    assert call["id"].startswith("toolu_") and call["id"] != other["id"]
    assert (message["stop_reason"], message["stop_sequence"]) == ("tool_use", None)
    streamed = assembled(events(client, body))
    for block in (*message["content"], *streamed["content"]):
        block.pop("id", None)
    assert {**streamed, "id": ""} == {**message, "id": ""}


def test_a_block_ends_before_the_next_begins(client: ApiClient, thinker: FakePipeline) -> None:
    thinker.reply = EVERYTHING
    found = [event for event in events(client, BODY | {"tools": [WEATHER]}) if event["type"].startswith("content")]
    order = [(event["type"].removeprefix("content_block_"), event["index"]) for event in found]
    kept = [entry for entry, before in zip(order, [None, *order], strict=False) if entry != before]
    assert kept == [(kind, index) for index in range(4) for kind in ("start", "delta", "stop")]


def test_white_space_alone_is_kept(client: ApiClient, thinker: FakePipeline) -> None:
    thinker.reply = " \n"
    assert client.post(URL, BODY).get_json()["content"] == [{"type": "text", "text": " \n"}]
    assert assembled(events(client, BODY))["content"] == [{"type": "text", "text": " \n"}]


class Deltas:
    """An answer whose deltas are given."""

    def __init__(self, *deltas: dict[str, Any]) -> None:
        self.deltas = deltas

    def feed(self, text: str) -> Iterator[dict[str, Any]]:
        return iter(self.deltas)

    def finish(self) -> Iterator[dict[str, Any]]:
        return iter(())


def test_white_space_between_calls_is_no_block() -> None:
    call = {"tool_calls": [{"id": "c", "function": {"name": "f", "arguments": ""}}]}
    texts = [{"content": text} for text in ("\n", " ", "\n", "a ")]
    given = Deltas(texts[0], call, texts[1], texts[2], call, texts[2], texts[3])
    pieces = AnswerPieces(cast(Any, given))
    assert [*pieces.feed("x"), *pieces.finish()] == [Call("c", "f"), Call("c", "f"), Text("\na ")]


def test_thoughts_may_be_left_out(client: ApiClient, thinker: FakePipeline) -> None:
    thinker.reply = "<think>hm</think>a"
    body = BODY | {"thinking": {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}}
    for message in (client.post(URL, body).get_json(), assembled(events(client, body))):
        thinking, text = message["content"]
        assert (thinking["thinking"], bool(thinking["signature"]), text["text"]) == ("", True, "a")


@pytest.mark.parametrize(
    ("extra", "reason"),
    [({"max_tokens": 3}, "max_tokens"), ({"max_tokens": 100_000}, "end_turn"), ({"max_tokens": 5}, "max_tokens")],
)
def test_an_answer_says_why_it_ended(client: ApiClient, extra: dict[str, Any], reason: str) -> None:
    assert client.post(URL, BODY | extra).get_json()["stop_reason"] == reason
    assert assembled(events(client, BODY | extra))["stop_reason"] == reason


def test_an_answer_that_fills_the_context_says_so(client: ApiClient, pipeline: FakePipeline) -> None:
    pipeline.reply = "x" * CONTEXT
    assert client.post(URL, BODY | {"max_tokens": 10 * CONTEXT}).get_json()["stop_reason"] == (
        "model_context_window_exceeded"
    )


def test_arguments_that_are_cut_off_are_what_can_be_read(client: ApiClient, thinker: FakePipeline) -> None:
    thinker.reply = CALL
    for cut, expected in ((CALL.index("slo"), {"city": "O"}), (CALL.index('"city'), {})):
        message = client.post(URL, BODY | {"tools": [WEATHER], "max_tokens": cut}).get_json()
        assert (message["content"][0]["input"], message["stop_reason"]) == (expected, "max_tokens")


def test_a_stream_that_fails_ends_with_an_error(client: ApiClient, pipeline: FakePipeline) -> None:
    pipeline.failing = {0: StepFailedError("The step failed.")}
    found = events(client, BODY)
    assert found[-1]["type"] == "error"
    assert found[-1]["error"]["type"] == "api_error"
    assert "message_stop" not in [event["type"] for event in found]


# ---- what the model is shown -------------------------------------------------------------------------------------


def test_a_conversation_is_the_same_in_the_templates_words(client: ApiClient, shown: Shown) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "redacted_thinking", "data": "x"},
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Oslo"}},
            {"type": "tool_use", "id": "t2", "name": "weather", "input": {}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "rain"}]},
            {"type": "tool_result", "tool_use_id": "t2", "content": "no city", "is_error": True},
            {"type": "text", "text": "and now?"},
        ]},
    ]  # fmt: skip
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    body = BODY | {
        "messages": messages,
        "system": system,
        "tools": [WEATHER, {"type": "bash_20250124", "name": "bash"}],
    }
    assert client.post(URL, body).status_code == 200
    given, options = shown[0]
    assert [(message["role"], message["content"]) for message in given] == [
        ("system", "Be brief."), ("user", "a\nb"), ("assistant", "I look."), ("tool", "rain"),
        ("tool", "Error: no city"), ("user", "and now?"),
    ]  # fmt: skip
    assert given[2]["reasoning_content"] == "hm"
    assert [call["function"]["arguments"] for call in given[2]["tool_calls"]] == [{"city": "Oslo"}, {}]
    assert [message["tool_call_id"] for message in given[3:5]] == ["t1", "t2"]
    (tool,) = options["tools"]
    assert tool["function"]["parameters"] == WEATHER["input_schema"]
    assert options["add_generation_prompt"] is True


def test_a_message_of_the_assistant_goes_on(client: ApiClient, shown: Shown) -> None:
    assert client.post(URL, BODY | {"messages": [USER, {"role": "assistant", "content": "He"}]}).status_code == 200
    assert (shown[0][1]["continue_final_message"], shown[0][1]["add_generation_prompt"]) == (True, False)


def test_parameters_reach_the_engine(client: ApiClient, pipeline: FakePipeline) -> None:
    extra = {"stop_sequences": ["x", "y"], "temperature": 0.5, "top_p": 0.25, "top_k": 7, "metadata": {"user_id": "u"}}
    assert client.post(URL, BODY | extra).status_code == 200
    params = pipeline.submitted[0][1]
    assert (params.stop, params.temperature, params.top_p, params.top_k) == (("x", "y"), 0.5, 0.25, 7)
    assert params.max_tokens == 400
    client.post(URL, BODY | {"max_tokens": 10_000})
    prompt, params = pipeline.submitted[1]
    assert params.max_tokens == CONTEXT - len(prompt)


def test_thinking_is_switched_where_the_template_can(
    client: ApiClient, shown: Shown, thinker: FakePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = anthropic_error(client.post(URL, BODY | {"thinking": {"type": "disabled"}}), 400)
    assert error["param"] == "thinking.type"
    monkeypatch.setattr(thinker.model.tokenizer, "template_variables", frozenset({"messages", "enable_thinking"}))
    for kind, wanted in (("disabled", False), ("adaptive", True), ("enabled", True)):
        assert client.post(URL, BODY | {"thinking": {"type": kind}}).status_code == 200
        assert shown[-1][1]["chat_template_kwargs"] == {"enable_thinking": wanted}
    family(thinker, None, None)
    assert client.post(URL, BODY).status_code == 200
    assert shown[-1][1]["chat_template_kwargs"] is None


@pytest.mark.parametrize(("choice", "tools"), [({"type": "auto"}, 1), ({"type": "none"}, 0)], ids=str)
def test_which_tools_may_be_called(client: ApiClient, shown: Shown, choice: Any, tools: int) -> None:
    assert client.post(URL, BODY | {"tools": [WEATHER], "tool_choice": choice}).status_code == 200
    assert len(shown[0][1]["tools"] or ()) == tools


def test_efforts_go_to_templates_that_take_them(
    client: ApiClient, shown: Shown, thinker: FakePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = BODY | {"output_config": {"effort": "high"}}
    assert client.post(URL, body).status_code == 200
    assert shown[-1][1]["chat_template_kwargs"] is None, "it is the default, which asks for nothing"
    monkeypatch.setattr(thinker.model.tokenizer, "template_variables", frozenset({"messages", "reasoning_effort"}))
    for effort, given in (("high", "high"), ("low", "low"), ("max", "xhigh")):
        assert client.post(URL, BODY | {"output_config": {"effort": effort}}).status_code == 200
        assert shown[-1][1]["chat_template_kwargs"] == {"reasoning_effort": given}


def test_one_call_where_more_are_not_wanted(client: ApiClient, thinker: FakePipeline) -> None:
    thinker.reply = CALL + CALL
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    content = client.post(URL, BODY | {"tools": [WEATHER], "tool_choice": choice}).get_json()["content"]
    assert [block["type"] for block in content] == ["tool_use"]


def test_tokens_are_counted_as_they_are_used(client: ApiClient, pipeline: FakePipeline) -> None:
    body = {"model": "demo", "messages": [USER], "system": "Be brief."}
    usage = client.post(URL, body | {"max_tokens": 5}).get_json()["usage"]
    counted = client.post(COUNT, body)
    assert counted.get_json() == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}
    assert len(pipeline.submitted) == 1, "nothing is computed for it"


# ---- what is refused ---------------------------------------------------------------------------------------------

IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
CALLED = {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]}


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [3]}]}, None),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
        ({"messages": [USER, CALLED]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [IMAGE]}]}]},
         "messages[0].content[0].content[0]"),
        ({"system": [IMAGE]}, "system[0]"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"thinking": {"type": "enabled", "budget_tokens": 3}}, "thinking.budget_tokens"),
        ({"tools": [{"name": "a b"}]}, "tools[0].name"),
        ({"tools": [{"name": "f", "input_schema": {"type": "string"}}]}, "tools[0].input_schema"),
        ({"tools": [WEATHER] * (MAX_TOOLS + 1)}, "tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice.name"),
        ({"output_config": {"effort": "low"}}, "output_config.effort"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"messages": [{"role": "user", "content": "a" * CONTEXT}]}, "messages"),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_what_is_wrong_is_named_as_the_client_does(
    client: ApiClient, thinker: FakePipeline, extra: dict[str, Any], param: str | None
) -> None:
    error = anthropic_error(client.post(URL, BODY | extra), 400)
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param
    assert not thinker.submitted


@pytest.mark.parametrize("path", [URL, COUNT])
def test_errors_have_anthropics_shape_before_there_is_a_route(app: Flask, client: ApiClient, path: str) -> None:
    stranger = app.test_client()
    assert anthropic_error(stranger.post(path, json=BODY), 401)["type"] == "authentication_error"
    assert anthropic_error(stranger.post(path, json=BODY, headers={"x-api-key": "no"}), 401)["message"]
    assert stranger.post(path, json=BODY, headers={"x-api-key": TOKEN}).status_code == 200
    assert stranger.post(path, json=BODY, headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert anthropic_error(client.post(path, data="{", content_type="application/json"), 400)
    assert anthropic_error(client.post(path, BODY | {"model": "x"}), 404)["type"] == "not_found_error"
    assert client.get(path).get_json()["type"] == "error"
    for version in ("2023-01-01", "newest"):
        old = client.post(path, BODY, headers={"anthropic-version": version})
        assert anthropic_error(old, 400)["param"] == "anthropic-version"
    assert client.post(path, BODY, headers={"anthropic-version": "2026-10-21"}).status_code == 200
    assert "type" not in client.post("/v1/completions", {}).get_json(), "other paths keep OpenAI's"


def test_a_full_queue_is_a_rate_limit(client: ApiClient, pipeline: FakePipeline) -> None:
    pipeline.refusal = QueueFullError("Full.")
    assert anthropic_error(client.post(URL, BODY), 429)["type"] == "rate_limit_error"


@pytest.mark.parametrize(
    "asked",
    [
        {"tools": [WEATHER], "tool_choice": {"type": "any"}},
        {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": WEATHER["name"]}},
        {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
    ],
)
def test_calls_that_must_be_and_forms_are_kept_to(
    client: ApiClient, thinker: FakePipeline, asked: dict[str, Any]
) -> None:
    assert client.post(URL, BODY | asked).status_code == 200
    assert thinker.submitted[-1][1].grammar is not None
    assert client.post(URL, BODY).status_code == 200
    assert thinker.submitted[-1][1].grammar is None
