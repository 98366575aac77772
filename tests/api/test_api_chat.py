"""`/v1/chat/completions`: answers, streams and messages."""

from __future__ import annotations

from typing import Any

import pytest
from api_client import ApiClient
from fake_pipeline import FakePipeline

URL = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]


def test_answer_has_openai_shape(client: ApiClient, pipeline: FakePipeline) -> None:
    body = client.post(URL, {"model": "demo", "messages": MESSAGES}).get_json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["system_fingerprint"].startswith("fp_")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + 5
    assert pipeline.submitted[0][1].max_tokens is None
    assert bytes(pipeline.submitted[0][0][1:]) == b"u:Hi\na:"


def test_text_parts_and_roles(client: ApiClient, pipeline: FakePipeline) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "x"},
        {"role": "assistant", "content": "c"},
    ]
    body = {"messages": messages, "continue_final_message": True}
    assert client.post(URL, body).status_code == 200
    assert bytes(pipeline.submitted[0][0][1:]) == b"s:Be brief.\nu:a\nb\na:c\n"


def test_max_completion_tokens_wins(client: ApiClient, pipeline: FakePipeline) -> None:
    body = client.post(URL, {"messages": MESSAGES, "max_tokens": 9, "max_completion_tokens": 2}).get_json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert pipeline.submitted[0][1].max_tokens == 2


def test_logprobs_shape(client: ApiClient) -> None:
    body = {"messages": MESSAGES, "max_tokens": 1, "logprobs": True, "top_logprobs": 2}
    entry = {"token": "H", "logprob": -1.0, "bytes": [72]}
    other = {"token": "I", "logprob": -2.0, "bytes": [73]}
    logprobs = client.post(URL, body).get_json()["choices"][0]["logprobs"]
    assert logprobs == {"content": [{**entry, "top_logprobs": [entry, other]}], "refusal": None}


def test_logprobs_without_alternatives(client: ApiClient) -> None:
    body = {"messages": MESSAGES, "max_tokens": 1, "logprobs": True}
    assert client.post(URL, body).get_json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_stream_gives_role_text_finish_usage(client: ApiClient) -> None:
    body = {"messages": MESSAGES, "n": 2, "stream_options": {"include_usage": True}}
    *chunks, usage, done = client.events(URL, body)
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 10
    assert usage["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
    for index in range(2):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
        assert "".join(choice["delta"].get("content", "") for choice in mine) == "Hello"
        assert mine[-1]["delta"] == {}
        assert [choice["finish_reason"] for choice in mine] == [None] * 6 + ["stop"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_stream_keeps_logprobs_of_tokens_without_text(client: ApiClient, pipeline: FakePipeline) -> None:
    pipeline.reply = "€"
    chunks = client.events(URL, {"messages": MESSAGES, "logprobs": True})[:-1]
    entries = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    tokens = [entry["content"][0]["bytes"] for entry in entries if entry is not None]
    assert tokens == [[0xE2], [0x82], [0xAC]]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (None, "messages"),
        ("Hi", "messages"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "robot", "content": "Hi"}], "messages[0].role"),
        ([{"content": "Hi"}], "messages[0].role"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([{"role": "user", "content": ["Hi"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0]"),
        (["Hi"], "messages[0]"),
    ],
)
def test_wrong_messages(client: ApiClient, messages: Any, param: str) -> None:
    assert client.error(URL, {"messages": messages}, status=400)["param"] == param


def test_image_parts_are_named_unsupported(client: ApiClient) -> None:
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]
    assert client.error(URL, {"messages": messages}, status=400)["code"] == "unsupported_parameter"


def test_template_that_fails(client: ApiClient) -> None:
    messages = [{"role": "tool", "content": "1", "tool_call_id": "c"}]
    assert client.error(URL, {"messages": messages}, status=400)["code"] == "chat_template_error"


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required", "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto"}, "tools"),
        ({"functions": [{"name": "f"}], "tool_choice": "none"}, "functions"),
    ],
)
def test_known_parameters_that_would_be_ignored_are_refused(client: ApiClient, extra: Any, param: str) -> None:
    error = client.error(URL, {"messages": MESSAGES, **extra}, status=400)
    assert (error["code"], error["param"]) == ("unsupported_parameter", param)


@pytest.mark.parametrize(
    "extra",
    [
        {"tools": [], "tool_choice": "none", "functions": None},
        {"tool_choice": "auto", "parallel_tool_calls": True},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
        {"functions": [{"name": "f"}], "function_call": "none"},
        {"top_logprobs": 0},
        {"response_format": {"type": "text"}, "modalities": ["text"], "store": False},
        {"user": "u", "metadata": {"a": "b"}, "something_new": {"x": [1]}},
    ],
)
def test_parameters_that_ask_for_nothing_are_accepted(client: ApiClient, extra: Any) -> None:
    assert client.post(URL, {"messages": MESSAGES, **extra}).status_code == 200


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"stream": True, "best_of": 2}, "best_of"),
    ],
)
def test_wrong_parameters(client: ApiClient, extra: Any, param: str) -> None:
    assert client.error(URL, {"messages": MESSAGES, **extra}, status=400)["param"] == param
