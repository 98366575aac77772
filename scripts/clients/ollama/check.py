"""Ollama's client for Python."""

from __future__ import annotations

import json
from typing import Any

import ollama
from common import ASKED, CITY, QUESTION, RAIN, TOLD, TOOL, check, hoped, in_cities, same, served, whole

demo, scripted = served("demo"), served("scripted")


def client(server: Any) -> Any:
    return ollama.Client(host=server.url, headers={"Authorization": f"Bearer {server.token}"}, timeout=600)


LIMIT: Any = {"temperature": 0, "num_predict": 1000}


@check("list, show, ps")
def _() -> Any:
    same([model.model for model in client(demo).list().models], [demo.model])
    same([model.model for model in client(demo).ps().models], [demo.model])
    return client(demo).show(demo.model).capabilities


@check("chat")
def _() -> Any:
    return hoped(client(demo).chat(demo.model, ASKED, options=LIMIT).message.content)


@check("chat streamed")
def _() -> Any:
    parts = client(demo).chat(demo.model, ASKED, options=LIMIT, stream=True)
    return hoped("".join(part.message.content or "" for part in parts))


@check("chat, format", constrained=True)
def _() -> Any:
    answer = client(demo).chat(demo.model, RAIN, options=LIMIT, format=CITY)
    whole(answer.done_reason, "stop")
    return in_cities(answer.message.content)


@check("generate")
def _() -> Any:
    return hoped(client(demo).generate(demo.model, QUESTION, options=LIMIT).response)


@check("generate, format: a schema", constrained=True)
def _() -> Any:
    answer = client(demo).generate(demo.model, RAIN[0]["content"], options=LIMIT, format=CITY)
    whole(answer.done_reason, "stop")
    return in_cities(answer.response)


@check("generate, format: json, streamed", constrained=True)
def _() -> Any:
    parts = list(client(demo).generate(demo.model, QUESTION, options=LIMIT, format="json", stream=True))
    whole(parts[-1].done_reason, "stop")
    return json.loads("".join(part.response for part in parts))


@check("tools, thoughts, and their result", on="scripted")
def _() -> Any:
    asked = client(scripted)
    message = asked.chat(scripted.model, RAIN, tools=[TOOL]).message
    same((message.thinking, message.content), ("Which city?", "I look."))
    in_cities(dict(message.tool_calls[0].function.arguments))
    result = {"role": "tool", "tool_name": "weather", "content": "rain"}
    return same(asked.chat(scripted.model, [*RAIN, message, result], tools=[TOOL]).message.content, TOLD)


@check("tools, streamed", on="scripted")
def _() -> Any:
    parts = client(scripted).chat(scripted.model, RAIN, tools=[TOOL], stream=True)
    calls = [call for part in parts for call in part.message.tool_calls or ()]
    return in_cities(dict(calls[0].function.arguments))


@check("embed")
def _() -> Any:
    vectors = client(demo).embed(demo.embedding, ["one text", "two texts"]).embeddings
    return f"{len(vectors)} of {len(vectors[0])} numbers"
