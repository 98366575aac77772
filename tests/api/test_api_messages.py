"""Messages as clients send them, and as a chat template sees them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from api_client import ApiClient
from fake_pipeline import FakePipeline

URL = "/v1/chat/completions"
USER = {"role": "user", "content": "a"}


@pytest.fixture
def rendered(pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, Any]]]:
    """The conversations that the template was given."""
    seen: list[list[dict[str, Any]]] = []

    def encode_chat(messages: list[dict[str, Any]], **_: Any) -> list[int]:
        seen.append(messages)
        return [97]

    monkeypatch.setattr(pipeline.model.tokenizer, "encode_chat", encode_chat)
    return seen


def call(arguments: Any, **changes: Any) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}, **changes}


def assistant(**fields: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", **fields}]}


@pytest.mark.parametrize(
    ("sent", "seen"),
    [
        ('{"city": "Paris", "days": 3}', {"city": "Paris", "days": 3}),
        ('{"nested": {"list": [1, null, "\\u00e9"]}}', {"nested": {"list": [1, None, "é"]}}),
        ({"city": "Paris"}, {"city": "Paris"}),
        ("{}", {}),
        ("", {}),
        (" \n", {}),
        (None, {}),
        # What a model wrote need not be JSON, and is part of the conversation all the same.
        ('{"city": "Par', '{"city": "Par'),
        ("[1, 2]", "[1, 2]"),
        ("Paris", "Paris"),
        ('{"x": ' * 100_000, '{"x": ' * 100_000),
        ('{"x": NaN}', '{"x": NaN}'),
        ('{"x": "\\ud800"}', '{"x": "\\ud800"}'),
    ],
    ids=lambda value: str(value)[:20],
)
def test_arguments_of_calls_are_objects(
    client: ApiClient, rendered: list[list[dict[str, Any]]], sent: Any, seen: Any
) -> None:
    result = {"role": "tool", "tool_call_id": "c1", "content": "sunny"}
    body = assistant(content=None, tool_calls=[call(sent)])
    body["messages"].append(result)
    assert client.post(URL, body).status_code == 200
    assert rendered == [[USER, {"role": "assistant", "content": None, "tool_calls": [call(seen)]}, result]]


@pytest.mark.parametrize("content", [None, [], "absent"])
def test_a_message_of_calls_needs_no_content(
    client: ApiClient, rendered: list[list[dict[str, Any]]], content: Any
) -> None:
    fields = {} if content == "absent" else {"content": content}
    assert client.post(URL, assistant(**fields, tool_calls=[call("{}")])).status_code == 200
    assert rendered[0][1]["content"] is None


def test_text_beside_calls_stays(client: ApiClient, rendered: list[list[dict[str, Any]]]) -> None:
    body = assistant(content=[{"type": "text", "text": "Let me look."}], tool_calls=[call("{}"), call("{}", id="c2")])
    assert client.post(URL, body).status_code == 200
    assert rendered[0][1]["content"] == "Let me look."
    assert [item["id"] for item in rendered[0][1]["tool_calls"]] == ["c1", "c2"]


def test_no_calls_are_no_calls(client: ApiClient, rendered: list[list[dict[str, Any]]]) -> None:
    body = assistant(content="b", tool_calls=[], function_call=None, refusal=None, audio=None, annotations=[])
    assert client.post(URL, body).status_code == 200
    assert rendered[0][1] == {"role": "assistant", "content": "b"}
    for empty in ({"tool_calls": []}, {"content": None, "tool_calls": []}, {"content": []}):
        error = client.error(URL, assistant(**empty), status=400)
        assert (error["param"], error["message"]) == ("messages[1].content", "messages[1] has no content.")


def test_the_older_functions_are_shown_as_tools(client: ApiClient, rendered: list[list[dict[str, Any]]]) -> None:
    body = assistant(content=None, function_call={"name": "f", "arguments": '{"a": 1}'})
    body["messages"] += [{"role": "function", "name": "f", "content": content} for content in ("2", None)]
    assert client.post(URL, body).status_code == 200
    expected = [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
    assert rendered[0][1] == {"role": "assistant", "content": None, "tool_calls": expected}
    assert rendered[0][2:] == [{"role": "tool", "name": "f", "content": content} for content in ("2", "")]


def test_a_refusal_is_what_the_assistant_said(client: ApiClient, rendered: list[list[dict[str, Any]]]) -> None:
    parts = [{"type": "text", "text": "b"}, {"type": "refusal", "refusal": "c"}]
    for fields, text in (({"content": None, "refusal": "No."}, "No."), ({"content": parts}, "b\nc")):
        assert client.post(URL, assistant(**fields)).status_code == 200
        assert rendered[-1][1] == {"role": "assistant", "content": text}


def test_reasoning_is_given_back_to_the_template(client: ApiClient, rendered: list[list[dict[str, Any]]]) -> None:
    assert client.post(URL, assistant(content="b", reasoning_content="because")).status_code == 200
    assert rendered[0][1] == {"role": "assistant", "content": "b", "reasoning_content": "because"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_calls": [call(3)]}, "messages[1].tool_calls[0].function.arguments"),
        ({"tool_calls": [call(["a"])]}, "messages[1].tool_calls[0].function.arguments"),
        ({"tool_calls": [call("{}"), {"type": "function"}]}, "messages[1].tool_calls[1].function"),
        ({"tool_calls": [{"function": {"arguments": "{}"}}]}, "messages[1].tool_calls[0].function"),
        ({"tool_calls": [{"function": {"name": 3}}]}, "messages[1].tool_calls[0].function"),
        ({"tool_calls": [{"type": "custom", "custom": {"name": "f"}}]}, "messages[1].tool_calls[0]"),
        ({"tool_calls": ["f"]}, "messages[1].tool_calls[0]"),
        ({"tool_calls": {}}, "messages[1].tool_calls"),
        ({"function_call": {"arguments": "{}"}}, "messages[1].function_call"),
        ({"content": [{"type": "refusal", "text": "x"}]}, "messages[1].content[0].refusal"),
    ],
)
def test_wrong_calls_are_named(client: ApiClient, fields: dict[str, Any], param: str) -> None:
    assert client.error(URL, assistant(**{"content": None, **fields}), status=400)["param"] == param


def test_tools_that_must_not_be_called_are_not_shown(client: ApiClient, pipeline: FakePipeline) -> None:
    client.post(URL, {"messages": [USER]})
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    answer = client.post(URL, {"messages": [USER], "tools": tools, "tool_choice": "none"})
    assert answer.get_json()["choices"][0]["message"] == {"role": "assistant", "content": "Hello", "refusal": None}
    assert pipeline.submitted[1] == pipeline.submitted[0]
    for choice in ("auto", None):
        error = client.error(URL, {"messages": [USER], "tools": tools, "tool_choice": choice}, status=400)
        assert (error["code"], error["param"]) == ("unsupported_parameter", "tools")


def test_every_route_that_takes_messages_reads_them_alike(
    client: ApiClient, rendered: list[list[dict[str, Any]]]
) -> None:
    body = assistant(content=None, tool_calls=[call(json.dumps({"a": 1}))])
    for path in (URL, "/tokenize", "/api/generate"):
        assert client.post(path, body).status_code == 200
    assert rendered[0] == rendered[1] == rendered[2]
    assert rendered[0][1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
