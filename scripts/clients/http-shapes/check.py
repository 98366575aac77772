"""Requests as some clients send them that are too large to install here: their routes and fields, not their code."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

from common import ASKED, TOLD, TOOL, Served, check, hoped, same, served

demo, scripted = served("demo"), served("scripted")
TIMEOUT_S = 600


def call(server: Served, path: str, body: Any = None) -> str:
    headers = {"Authorization": f"Bearer {server.token}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(server.url + path, data, headers), timeout=TIMEOUT_S) as answer:
        text: str = answer.read().decode()
    return text


def deltas(stream: str) -> list[dict[str, Any]]:
    """Of a stream of a chat completion, which has to end as one."""
    lines = [line.removeprefix("data: ") for line in stream.split("\n") if line.startswith("data: ")]
    same(lines[-1], "[DONE]")
    return [part["delta"] for line in lines[:-1] for part in json.loads(line)["choices"]]


def text_of(stream: str) -> str:
    return "".join(delta.get("content") or "" for delta in deltas(stream))


@check("Open WebUI: models, chat, a title")
def _() -> Any:
    names = [model["id"] for model in json.loads(call(demo, "/v1/models"))["data"]]
    body = {"model": names[0], "messages": ASKED, "stream": True, "stream_options": {"include_usage": True}}
    said = text_of(call(demo, "/v1/chat/completions", body))
    title = {"model": names[0], "messages": ASKED, "stream": False, "max_completion_tokens": 1000}
    assert json.loads(call(demo, "/v1/chat/completions", title))["choices"][0]["message"]["content"]
    return hoped(said)


@check("Open WebUI: embeddings of documents")
def _() -> Any:
    body = {"model": demo.embedding, "input": ["one text", "two texts"]}
    return f"{len(json.loads(call(demo, '/v1/embeddings', body))['data'])} vectors"


@check("Continue: chat, and a completion to a stop string")
def _() -> Any:
    chat = {"model": demo.model, "messages": ASKED, "max_tokens": 1000, "stream": True}
    said = text_of(call(demo, "/v1/chat/completions", chat))
    plain = {"model": demo.model, "prompt": "def add(a, b):\n", "max_tokens": 8, "temperature": 0.01, "stop": ["\n\n"],
             "stream": True}  # fmt: skip
    assert "data: [DONE]" in call(demo, "/v1/completions", plain)
    return hoped(said)


@check("n8n: an agent's turn, and its next", on="scripted")
def _() -> Any:
    body: dict[str, Any] = {
        "model": scripted.model, "messages": ASKED, "tools": [TOOL], "temperature": 0.7, "top_p": 1,
        "frequency_penalty": 0, "presence_penalty": 0, "n": 1, "stream": True,
        "stream_options": {"include_usage": True}, "response_format": {"type": "text"},
    }  # fmt: skip
    pieces = [piece for delta in deltas(call(scripted, "/v1/chat/completions", body))
              for piece in delta.get("tool_calls", ())]  # fmt: skip
    made = {"id": pieces[0]["id"], "type": "function", "function": {
        "name": pieces[0]["function"]["name"],
        "arguments": "".join(piece["function"].get("arguments", "") for piece in pieces),
    }}  # fmt: skip
    turn = [{"role": "assistant", "content": "", "tool_calls": [made]},
            {"role": "tool", "tool_call_id": made["id"], "content": "rain"}]  # fmt: skip
    return same(text_of(call(scripted, "/v1/chat/completions", body | {"messages": [*ASKED, *turn]})), TOLD)


@check("Home Assistant: tags, a streamed chat")
def _() -> Any:
    """As its integration for Ollama does."""
    (model,) = json.loads(call(demo, "/api/tags"))["models"]
    body = {
        "model": model["model"], "messages": [{"role": "system", "content": "You control a house."}, *ASKED],
        "stream": True, "keep_alive": "-1s", "options": {"num_ctx": 8192}, "think": False,
    }  # fmt: skip
    lines = [json.loads(line) for line in call(demo, "/api/chat", body).splitlines()]
    same(lines[-1]["done"], True)
    return "".join(line["message"]["content"] for line in lines)


@check("Home Assistant: a call of a tool", on="scripted")
def _() -> Any:
    body = {"model": scripted.model, "messages": ASKED, "tools": [TOOL], "stream": True, "keep_alive": "-1s",
            "options": {"num_ctx": 8192}}  # fmt: skip
    lines = [json.loads(line) for line in call(scripted, "/api/chat", body).splitlines()]
    (made,) = [each for line in lines for each in line["message"].get("tool_calls", ())]
    return same(made["function"]["arguments"], {"city": "Oslo"})


@check("llama.cpp's clients: /completion with a grammar", constrained=True)
def _() -> Any:
    body = {"prompt": "Weather in Oslo?", "n_predict": 16, "grammar": 'root ::= "rain" | "sun"'}
    answer = json.loads(call(demo, "/completion", body))
    assert answer["content"] in ("rain", "sun"), answer["content"]
    return answer["content"]
