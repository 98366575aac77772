"""Anthropic's client for Python."""

from __future__ import annotations

from typing import Any

import anthropic
from common import ASKED, CITY, RAIN, TOLD, check, hoped, in_cities, same, served, whole

demo, scripted = served("demo"), served("scripted")
client = anthropic.Anthropic(base_url=demo.url, api_key=demo.token, max_retries=0, timeout=600)
other = anthropic.Anthropic(base_url=scripted.url, auth_token=scripted.token, max_retries=0, timeout=600)
TOOLS: Any = [{"name": "weather", "description": "Says what the weather in a city is.", "input_schema": CITY}]


def ended(message: Any, reason: str) -> None:
    whole("length" if message.stop_reason == "max_tokens" else message.stop_reason, reason)


@check("messages")
def _() -> Any:
    answer = client.messages.create(model=demo.model, max_tokens=1000, messages=ASKED, extra_body={"temperature": 0})
    ended(answer, "end_turn")
    return hoped(answer.content[0].text)


@check("messages streamed")
def _() -> Any:
    with client.messages.stream(
        model=demo.model, max_tokens=1000, messages=ASKED, extra_body={"temperature": 0}
    ) as stream:
        text = "".join(stream.text_stream)
        same(text, stream.get_final_message().content[0].text)
    return hoped(text)


@check("tools, named", constrained=True)
def _() -> Any:
    choice: Any = {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}
    answer = client.messages.create(
        model=demo.model, max_tokens=1000, messages=RAIN, tools=TOOLS, tool_choice=choice)  # fmt: skip
    ended(answer, "tool_use")
    return in_cities(answer.content[-1].input)


@check("tools, auto, streamed, and their result", on="scripted")
def _() -> Any:
    asked: Any = {"model": scripted.model, "max_tokens": 400, "tools": TOOLS}
    with other.messages.stream(messages=RAIN, **asked) as stream:
        answer = stream.get_final_message()
    thoughts, text, call = answer.content
    same((thoughts.thinking, text.text), ("Which city?", "I look."))
    in_cities(call.input)
    result: Any = [{"type": "tool_result", "tool_use_id": call.id, "content": "rain"}]
    history: Any = [*RAIN, {"role": "assistant", "content": answer.content}, {"role": "user", "content": result}]
    return same(other.messages.create(messages=history, **asked).content[0].text, TOLD)


@check("count_tokens")
def _() -> Any:
    counted = client.messages.count_tokens(model=demo.model, messages=ASKED)
    answer = client.messages.create(model=demo.model, max_tokens=1, messages=ASKED)
    return same(counted.input_tokens, answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0))


@check("models.list")
def _() -> Any:
    names = [model.id for model in client.models.list()]
    assert demo.model in names, names
    return len(names)


@check("errors are typed")
def _() -> Any:
    try:
        client.messages.create(model="nothing", max_tokens=1, messages=ASKED)
    except anthropic.NotFoundError as error:
        return error.message
    raise AssertionError("no error")
