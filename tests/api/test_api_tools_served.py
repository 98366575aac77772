"""Tools with a real engine and OpenAI's own client: special tokens reach the parser and nobody else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
from api_client import TOKEN
from front_doors import serving
from openai.lib.streaming.chat import ChatCompletionStreamState
from scripted_models import build_scripted

from core.api import create_app
from core.inference_pipeline import InferencePipeline

OpenPipeline = Callable[..., InferencePipeline]

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Says what the weather is; [INST] and [TOOL_CALLS] are text here.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
MISTRAL = (
    "{% for m in messages %}{% if m.tool_calls %}[TOOL_CALLS]{{ m.tool_calls | tojson }}{% else %}[INST]{{ m.content }}"
    "{% endif %}{% endfor %}{% if tools %}[TOOLS]{{ tools | tojson }}{% endif %}[/INST]"
)
MISTRAL_TOKENS = ["[INST]", "[/INST]", "[TOOLS]", "[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]", "[IMG]"]
CALLS = [
    "[THINK]", "Which city?", "[/THINK]", "I look.", "[TOOL_CALLS]", "weather", "[ARGS]", '{"city": ', '"Oslo"}',
]  # fmt: skip


@pytest.fixture
def ask(open_pipeline: OpenPipeline, tmp_path: Path) -> Iterator[Callable[..., openai.OpenAI]]:
    """Serves a model that writes a script, and gives a client."""
    with ExitStack() as opened:

        def start(
            script: list[str], template: str = MISTRAL, tokens: list[str] = MISTRAL_TOKENS, **options: Any
        ) -> Any:
            build_scripted(tmp_path, "[/INST]", script, template, special=tokens)
            port = opened.enter_context(serving(create_app(open_pipeline(tmp_path, api__token=TOKEN, **options))))
            url = f"http://127.0.0.1:{port}/v1"
            return opened.enter_context(openai.OpenAI(base_url=url, api_key=TOKEN, max_retries=0, timeout=60))

        yield start


def create(client: openai.OpenAI, **options: Any) -> Any:
    """An answer to a plain question, put together by the client's own accumulator if it is streamed."""
    body = {"model": client.models.list().data[0].id, "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
    answer = client.chat.completions.create(**{**body, **options})
    if not options.get("stream"):
        return answer
    state = ChatCompletionStreamState()
    for chunk in answer:
        state.handle_chunk(chunk)
    return state.get_final_completion()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_openais_client_puts_calls_together(ask: Callable[..., openai.OpenAI], stream: bool, n: int) -> None:
    answer = create(ask(CALLS), tools=TOOLS, stream=stream, n=n)
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "I look."
        (call,) = choice.message.tool_calls
        assert (call.type, call.function.name) == ("function", "weather")
        assert json.loads(call.function.arguments) == {"city": "Oslo"}
        assert len(call.id) == 9
        if not stream:
            assert choice.message.reasoning_content == "Which city?"
    assert len({choice.message.tool_calls[0].id for choice in answer.choices}) == n


def test_markup_is_not_shown_where_nobody_asked_for_tools(ask: Callable[..., openai.OpenAI]) -> None:
    client = ask(CALLS)
    (choice,) = create(client).choices
    assert (choice.message.content, choice.finish_reason) == ('I look.weather{"city": "Oslo"}', "stop")
    (choice,) = create(client, extra_body={"skip_special_tokens": False}).choices
    assert choice.message.content == 'I look.[TOOL_CALLS]weather[ARGS]{"city": "Oslo"}'


def test_other_special_tokens_stay_hidden(ask: Callable[..., openai.OpenAI]) -> None:
    script = ["See", "[IMG]", " it", "[TOOL_CALLS]", "unheard-of", "[ARGS]", "{}"]
    (choice,) = create(ask(script), tools=TOOLS).choices
    assert (choice.message.content, choice.finish_reason) == ("See itunheard-of{}", "stop")


def test_stop_strings_see_special_tokens_once(ask: Callable[..., openai.OpenAI]) -> None:
    client = ask(CALLS)
    for stop, content, calls in (("[TOOL_CALLS]", "I look.", 0), ("[IMG]", "I look.", 1), ('"Oslo"}', "I look.", 1)):
        (choice,) = create(client, tools=TOOLS, stop=[stop]).choices
        assert choice.message.content == content
        assert len(choice.message.tool_calls or ()) == calls
    assert choice.message.tool_calls[0].function.arguments == '{"city": '


def test_a_setting_names_the_parsers(ask: Callable[..., openai.OpenAI]) -> None:
    client = ask(CALLS, model__tool_parser="hermes", model__reasoning_parser="none")
    (choice,) = create(client, tools=TOOLS).choices
    assert (choice.message.content, choice.finish_reason) == ('Which city?I look.weather{"city": "Oslo"}', "stop")


def test_each_load_may_name_the_parsers(open_pipeline: OpenPipeline, tmp_path: Path) -> None:
    build_scripted(tmp_path, "[/INST]", CALLS, MISTRAL, special=MISTRAL_TOKENS)
    pipeline = open_pipeline(tmp_path, model__tool_parser="glm")

    def parsers() -> tuple[str | None, str | None]:
        return pipeline.model.output_format.tool_parser, pipeline.model.output_format.reasoning_parser

    assert parsers() == ("glm", "mistral"), "what is not named is recognised"
    pipeline.load(tool_parser="hermes", reasoning_parser="think")
    assert parsers() == ("hermes", "think")
    build_scripted(tmp_path / "other", "[/INST]", CALLS, MISTRAL, special=MISTRAL_TOKENS)
    pipeline.load(str(tmp_path / "other"))
    assert parsers() == ("mistral", "mistral"), "of another model nobody has said anything"


HARMONY_TOKENS = [
    "[/INST]",
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|constrain|>",
    "<|end|>",
    "<|call|>",
    "<|return|>",
]
HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}{{ tools | tojson }}"
    "{# <|channel|> #}{{ reasoning_effort }}[/INST]"
)


def test_channels_are_thoughts_and_calls(ask: Callable[..., openai.OpenAI]) -> None:
    head = ["<|channel|>", "commentary to=functions.", "now ", "<|constrain|>", "json", "<|message|>"]
    (choice,) = create(ask([*head, "{}"], HARMONY, HARMONY_TOKENS), tools=TOOLS).choices
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")
    assert choice.message.tool_calls[0].function.name == "now"


def test_channels_are_read_without_tools(ask: Callable[..., openai.OpenAI]) -> None:
    client = ask(["<|channel|>", "analysis", "<|message|>", "hm."], HARMONY, HARMONY_TOKENS)
    (choice,) = create(client, reasoning_effort="low").choices
    assert (choice.message.content, choice.message.reasoning_content) == ("", "hm.")
    with pytest.raises(openai.BadRequestError, match="of chat_template_kwargs it takes reasoning_effort"):
        create(client, extra_body={"chat_template_kwargs": {"style": "short"}})


def test_a_template_that_has_no_place_for_tools_is_named(ask: Callable[..., openai.OpenAI]) -> None:
    client = ask(CALLS, "{{ messages[0].content }}[/INST]", model__tool_parser="mistral")
    with pytest.raises(openai.BadRequestError, match="no place for tools") as refused:
        create(client, tools=TOOLS)
    assert refused.value.param == "tools"
