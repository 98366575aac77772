"""Constrained answers with a real engine and OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest
from api_client import TOKEN
from front_doors import serving
from scripted_models import build_scripted

from core.api import create_app
from core.inference_pipeline import InferencePipeline

OpenPipeline = Callable[..., InferencePipeline]
MISTRAL = (
    "{% for m in messages %}[INST]{{ m.content }}{% endfor %}{% if tools %}[TOOLS]{{ tools | tojson }}{% endif %}"
    "[/INST]{# [TOOL_CALLS] [ARGS] #}"
)
HERMES = (
    "{% for m in messages %}[INST]{{ m.content }}{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}[/INST]"
    "{# <tool_call> <think> </think> #}"
)
TOKENS = ["[INST]", "[/INST]", "[TOOLS]", "[TOOL_CALLS]", "[ARGS]"]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Lima"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "additionalProperties": False}}},
]
SCRIPT = ["I say", " that", " it rains"]


class Answer(pydantic.BaseModel):
    city: Literal["Oslo", "Lima"]
    sure: bool


@pytest.fixture
def ask(open_pipeline: OpenPipeline, tmp_path: Path) -> Iterator[Callable[..., openai.OpenAI]]:
    """Serves a model that would write a script, and gives a client."""
    with ExitStack() as opened:

        def start(script: list[str] = SCRIPT, template: str = MISTRAL, **options: Any) -> openai.OpenAI:
            build_scripted(tmp_path, "[/INST]", script, template, special=TOKENS)
            port = opened.enter_context(
                serving(create_app(open_pipeline(tmp_path, api__token=TOKEN, model__served_model_name="m", **options)))
            )
            url = f"http://127.0.0.1:{port}/v1"
            return opened.enter_context(openai.OpenAI(base_url=url, api_key=TOKEN, max_retries=0, timeout=60))

        yield start


def create(client: openai.OpenAI, **options: Any) -> Any:
    messages: Any = [{"role": "user", "content": "Weather?"}]
    return client.chat.completions.create(model="m", messages=messages, **{"max_tokens": 150, **options})


@pytest.mark.parametrize("template", [MISTRAL, HERMES])
def test_required_and_named_calls_parse_and_match(ask: Callable[..., openai.OpenAI], template: str) -> None:
    client = ask(template=template)
    assert create(client, tools=TOOLS, temperature=0).choices[0].message.tool_calls is None, "it would rather not"
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        for seed in range(4):
            answer = create(
                client, tools=TOOLS, tool_choice=choice, seed=seed, temperature=1, parallel_tool_calls=False
            ).choices[0]
            assert answer.finish_reason in ("tool_calls", "length")
            if answer.finish_reason == "length":
                continue
            (call,) = answer.message.tool_calls
            arguments = json.loads(call.function.arguments)
            if choice == named or call.function.name == "weather":
                assert call.function.name == "weather"
                assert arguments["city"] in ("Oslo", "Lima") and 1 <= arguments["days"] <= 9 and len(arguments) == 2
            else:
                assert arguments == {}


def test_streamed_calls_are_the_same(ask: Callable[..., openai.OpenAI]) -> None:
    client = ask()
    options: Any = {"tools": TOOLS, "tool_choice": "required", "seed": 1, "temperature": 1}
    whole = create(client, **options).choices[0].message
    pieces: dict[int, list[str]] = {}
    for chunk in create(client, stream=True, **options):
        for call in chunk.choices[0].delta.tool_calls or ():
            pieces.setdefault(call.index, []).append((call.function.name or "") + (call.function.arguments or ""))
    assert ["".join(each) for each in pieces.values()] == [
        call.function.name + call.function.arguments for call in whole.tool_calls or ()
    ]


def test_the_parse_helper_gives_objects(ask: Callable[..., openai.OpenAI]) -> None:
    client = ask()
    messages: Any = [{"role": "user", "content": "Where?"}]
    parsed = client.chat.completions.parse(
        model="m", messages=messages, response_format=Answer, n=3, temperature=1, seed=2, max_tokens=100
    )
    for choice in parsed.choices:
        assert choice.finish_reason == "stop" and isinstance(choice.message.parsed, Answer)


def test_a_form_beside_tools_is_kept_to_where_none_is_called(ask: Callable[..., openai.OpenAI]) -> None:
    client = ask()
    form: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": PARAMETERS, "strict": True}}
    seen = set()
    for seed in range(6):
        answer = create(client, tools=TOOLS, response_format=form, seed=seed, temperature=2).choices[0]
        if answer.finish_reason == "stop":
            assert json.loads(answer.message.content)["city"] in ("Oslo", "Lima")
        seen.add(answer.finish_reason)
    assert seen <= {"stop", "tool_calls", "length"} and seen & {"stop", "tool_calls"}


def test_thoughts_come_first(ask: Callable[..., openai.OpenAI]) -> None:
    """A model that thinks does so before an answer that keeps to a schema."""
    script = ["<think>", "Which", " city?", "</think>", "I say", " that"]
    client = ask(script, HERMES)
    form: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": PARAMETERS, "strict": True}}
    message = create(client, response_format=form, temperature=0, max_tokens=600).choices[0].message
    assert message.reasoning_content == "Which city?"
    assert json.loads(message.content)["city"] in ("Oslo", "Lima")
    called = create(
        client, tools=TOOLS, tool_choice="required", temperature=0, max_tokens=600, parallel_tool_calls=False
    ).choices[0]
    assert called.message.reasoning_content == "Which city?"
    assert called.message.tool_calls[0].function.name in ("weather", "now")


def test_a_hostile_schema_is_a_400_and_others_go_on(ask: Callable[..., openai.OpenAI]) -> None:
    client = ask()
    hostile = {"allOf": [{"type": "string", "pattern": f"a{number}.*b"} for number in range(30)]}
    with pytest.raises(openai.BadRequestError, match="2 s"):
        create(client, extra_body={"guided_json": hostile})
    tools: Any = [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {
        "type": "object", "properties": {"a": {"not": {"type": "null"}}}}}}]  # fmt: skip
    with pytest.raises(openai.BadRequestError, match="not"):
        create(client, tools=tools)
    assert create(client, extra_body={"guided_choice": ["yes"]}).choices[0].message.content == "yes"
