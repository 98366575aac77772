"""OpenAI's client for Python."""

from __future__ import annotations

import time
from typing import Any, Literal

import openai
import pydantic
from common import (
    ASKED,
    GREETING,
    RAIN,
    TOLD,
    TOOL,
    WEATHER,
    check,
    hoped,
    in_cities,
    same,
    served,
    whole,
)

demo, scripted = served("demo"), served("scripted")
client = openai.OpenAI(base_url=demo.v1, api_key=demo.token, max_retries=0, timeout=600)
other = openai.OpenAI(base_url=scripted.v1, api_key=scripted.token, max_retries=0, timeout=600)
LIMIT: Any = {"max_tokens": 1000, "temperature": 0}


class City(pydantic.BaseModel):
    """Says what the weather in a city is."""

    city: Literal["Oslo", "Lima", "Rome"]


@check("models.list")
def _() -> Any:
    names = [model.id for model in client.models.list()]
    assert demo.model in names and demo.embedding in names, names
    return same(client.models.retrieve(demo.model).id, demo.model)


@check("chat")
def _() -> Any:
    answer = client.chat.completions.create(model=demo.model, messages=ASKED, **LIMIT)
    whole(answer.choices[0].finish_reason, "stop")
    return hoped(answer.choices[0].message.content)


@check("chat streamed")
def _() -> Any:
    usage: Any = {"include_usage": True}
    parts = list(client.chat.completions.create(
        model=demo.model, messages=ASKED, stream=True, stream_options=usage, **LIMIT))  # fmt: skip
    assert parts[-1].usage.completion_tokens > 1
    return hoped("".join(part.choices[0].delta.content or "" for part in parts if part.choices))


@check("completions, log-probabilities")
def _() -> Any:
    answer = client.completions.create(model=demo.model, prompt="Hello", max_tokens=4, logprobs=2)
    return same(len(answer.choices[0].logprobs.tokens), 4)


@check("tools, named", constrained=True)
def _() -> Any:
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    answer = client.chat.completions.create(model=demo.model, messages=RAIN, tools=[TOOL], tool_choice=choice, **LIMIT)
    whole(answer.choices[0].finish_reason, "tool_calls")
    return in_cities(answer.choices[0].message.tool_calls[0].function.arguments)


@check("tools, required, streamed", constrained=True)
def _() -> Any:
    with client.chat.completions.stream(
        model=demo.model, messages=RAIN, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, **LIMIT
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    whole(final.choices[0].finish_reason, "tool_calls")
    return in_cities(final.choices[0].message.tool_calls[0].function.arguments)


@check("tools, auto", on="scripted")
def _() -> Any:
    answer = other.chat.completions.create(model=scripted.model, messages=RAIN, tools=[TOOL])
    message = answer.choices[0].message
    whole(answer.choices[0].finish_reason, "tool_calls")
    in_cities(message.tool_calls[0].function.arguments)
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0
    same((message.content, message.reasoning_content), ("I look.", "Which city?"))
    result: Any = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    later = other.chat.completions.create(model=scripted.model, messages=[*RAIN, message, result], tools=[TOOL])
    return same(later.choices[0].message.content, TOLD)


@check("tools, auto, streamed", on="scripted")
def _() -> Any:
    with other.chat.completions.stream(model=scripted.model, messages=RAIN, tools=[TOOL]) as stream:
        kinds = {event.type for event in stream}
        call = stream.get_final_completion().choices[0].message.tool_calls[0]
    assert "tool_calls.function.arguments.done" in kinds, kinds
    return in_cities(call.function.arguments)


@check("chat.completions.parse", constrained=True)
def _() -> Any:
    answer = client.chat.completions.parse(model=demo.model, messages=RAIN, response_format=City, **LIMIT)
    return answer.choices[0].message.parsed.city


@check("parse, strict tool", constrained=True)
def _() -> Any:
    tool = openai.pydantic_function_tool(City)
    answer = client.chat.completions.parse(
        model=demo.model, messages=RAIN, tools=[tool], tool_choice="required", parallel_tool_calls=False, **LIMIT
    )
    return answer.choices[0].message.tool_calls[0].function.parsed_arguments.city


@check("JSON mode", constrained=True)
def _() -> Any:
    answer = client.chat.completions.create(
        model=demo.model, messages=RAIN, response_format={"type": "json_object"}, **LIMIT)  # fmt: skip
    whole(answer.choices[0].finish_reason, "stop")
    return pydantic.TypeAdapter(dict).validate_json(answer.choices[0].message.content)


@check("embeddings")
def _() -> Any:
    given: Any = {"model": demo.embedding, "input": ["one text", "two texts"]}
    packed = client.embeddings.create(**given).data
    plain = client.embeddings.create(**given, encoding_format="float").data
    same(len(packed), 2)
    assert max(abs(a - b) for a, b in zip(packed[1].embedding, plain[1].embedding, strict=True)) < 1e-6
    return f"{len(packed[0].embedding)} numbers"


@check("responses")
def _() -> Any:
    answer = client.responses.create(model=demo.model, input=ASKED, temperature=0)
    same(client.responses.retrieve(answer.id).output_text, answer.output_text)
    return hoped(answer.output_text)


@check("responses streamed, tools", on="scripted")
def _() -> Any:
    tools: Any = [{"type": "function", **WEATHER, "strict": False}]
    with other.responses.stream(model=scripted.model, input=RAIN, tools=tools) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    same((kinds[0], kinds[-1]), ("response.created", "response.completed"))
    assert final.usage.output_tokens_details.reasoning_tokens > 0
    in_cities(final.output[-1].arguments)
    result: Any = {"type": "function_call_output", "call_id": final.output[-1].call_id, "output": "rain"}
    later = other.responses.create(model=scripted.model, input=[result], tools=tools, previous_response_id=final.id)
    return same(later.output_text, TOLD)


@check("responses.parse", constrained=True)
def _() -> Any:
    answer = client.responses.parse(model=demo.model, input=RAIN, text_format=City, max_output_tokens=1000)
    return answer.output_parsed.city


@check("responses in the background", on="scripted")
def _() -> Any:
    answer = other.responses.create(model=scripted.model, input=ASKED, background=True)
    seen = [answer.status]
    while answer.status in ("queued", "in_progress"):
        time.sleep(0.05)
        answer = other.responses.retrieve(answer.id)
        seen.append(answer.status)
    same((seen[0], seen[-1], answer.output_text), ("queued", "completed", GREETING))
    running = other.responses.create(model=scripted.model, input=ASKED, background=True)
    try:
        return f"then one that was {other.responses.cancel(running.id).status}"
    except openai.BadRequestError:  # it was quicker
        return f"then one that was {other.responses.retrieve(running.id).status}"


@check("errors are typed")
def _() -> Any:
    try:
        client.chat.completions.create(model="nothing", messages=ASKED)
    except openai.NotFoundError as error:
        return error.code
    raise AssertionError("no error")
