"""LiteLLM, as a library."""

from __future__ import annotations

from typing import Any

import litellm
from common import ASKED, CITY, RAIN, TOLD, TOOL, check, hoped, in_cities, same, served, whole

demo, scripted = served("demo"), served("scripted")
litellm.telemetry = False


def ask(server: Any, **options: Any) -> Any:
    return litellm.completion(
        model=f"openai/{server.model}", api_base=server.v1, api_key=server.token, max_tokens=1000, temperature=0,
        num_retries=0, **options,
    )  # fmt: skip


@check("completion")
def _() -> Any:
    answer = ask(demo, messages=ASKED)
    whole(answer.choices[0].finish_reason, "stop")
    return hoped(answer.choices[0].message.content)


@check("completion streamed")
def _() -> Any:
    parts = list(ask(demo, messages=ASKED, stream=True, stream_options={"include_usage": True}))
    whole_answer = litellm.stream_chunk_builder(parts, messages=ASKED)
    assert whole_answer.usage.completion_tokens > 1
    return hoped(whole_answer.choices[0].message.content)


@check("tools, required", constrained=True)
def _() -> Any:
    choice = ask(demo, messages=RAIN, tools=[TOOL], tool_choice="required", parallel_tool_calls=False).choices[0]
    whole(choice.finish_reason, "tool_calls")
    return in_cities(choice.message.tool_calls[0].function.arguments)


@check("tools, auto, and their result", on="scripted")
def _() -> Any:
    message = ask(scripted, messages=RAIN, tools=[TOOL]).choices[0].message
    same(message.reasoning_content, "Which city?")
    in_cities(message.tool_calls[0].function.arguments)
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    later = ask(scripted, messages=[*RAIN, message, result], tools=[TOOL])
    return same(later.choices[0].message.content, TOLD)


@check("JSON schema", constrained=True)
def _() -> Any:
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    choice = ask(demo, messages=RAIN, response_format=form).choices[0]
    whole(choice.finish_reason, "stop")
    return in_cities(choice.message.content)


@check("embedding")
def _() -> Any:
    answer = litellm.embedding(
        model=f"openai/{demo.embedding}", input=["one text", "two texts"], api_base=demo.v1, api_key=demo.token
    )
    return f"{len(answer.data)} of {len(answer.data[0]['embedding'])} numbers"


@check("responses", on="scripted")
def _() -> Any:
    answer = litellm.responses(
        model=f"openai/{scripted.model}", input=RAIN, api_base=scripted.v1, api_key=scripted.token
    )
    return same(answer.status, "completed")


@check("Anthropic's API")
def _() -> Any:
    answer = litellm.completion(
        model=f"anthropic/{demo.model}", api_base=demo.url, api_key=demo.token, messages=ASKED, max_tokens=1000,
        temperature=0,
    )  # fmt: skip
    return hoped(answer.choices[0].message.content)


@check("Ollama's API")
def _() -> Any:
    answer = litellm.completion(
        model=f"ollama_chat/{demo.model}", api_base=demo.url, api_key=demo.token, messages=ASKED, max_tokens=1000,
        temperature=0,
    )  # fmt: skip
    return hoped(answer.choices[0].message.content)
