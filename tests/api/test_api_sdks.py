"""Other APIs with a real engine, and the clients that their makers give out. One that is not installed is skipped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
from api_client import TOKEN
from front_doors import serving
from scripted_models import build_scripted

from core.api import create_app
from core.inference_pipeline import InferencePipeline

pytestmark = pytest.mark.filterwarnings("default")  # clients have warnings of their own

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TEMPLATE = (
    "{% for m in messages %}{% if m.tool_calls %}[TOOL_CALLS]{{ m.tool_calls | tojson }}{% else %}[INST]{{ m.content }}"
    "{% endif %}{% endfor %}{% if tools %}[TOOLS]{{ tools | tojson }}{% endif %}[/INST]"
)
TOKENS = ["[INST]", "[/INST]", "[TOOLS]", "[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]"]
CALLS = ["[THINK]", "Which city?", "[/THINK]", "I look.", "[TOOL_CALLS]", "weather", "[ARGS]", '{"city": ', '"Oslo"}']
ASKED: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]


BRIEF = "{% if false %}{{ tools }}{{ '[TOOL_CALLS][ARGS]' }}{% endif %}[INST]{{ messages[-1].role }}[/INST]"
"""A template that leaves out what is said, for programs whose own instructions are longer than a small context."""


@pytest.fixture
def brief(open_pipeline: Callable[..., InferencePipeline], tmp_path: Path) -> Iterator[str]:
    """Serves a model, called model, that thinks and greets, whatever it is told."""
    with ExitStack() as opened:
        directory = tmp_path / "model"
        script = ["[THINK]", "It is a greeting.", "[/THINK]", "Hello from the ", "scripted model."]
        build_scripted(directory, "[/INST]", script, BRIEF, special=TOKENS)
        port = opened.enter_context(serving(create_app(open_pipeline(directory, api__token=TOKEN))))
        yield f"http://127.0.0.1:{port}"


def run_program(name: str, arguments: list[str], home: Path, **environment: str) -> str:
    """What a program says that has to end well, with a home of its own."""
    program = shutil.which(name)
    if program is None:
        pytest.skip(f"{name} is not installed")
    done = subprocess.run(
        [program, *arguments], cwd=home, capture_output=True, text=True, timeout=120, check=False,
        stdin=subprocess.DEVNULL, env={"PATH": os.environ["PATH"], "HOME": str(home), "TERM": "dumb", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_claude_code_asks(brief: str, tmp_path: Path) -> None:
    said = run_program(
        "claude", ["-p", "Say hello", "--model", "model"], tmp_path, ANTHROPIC_BASE_URL=brief, ANTHROPIC_API_KEY=TOKEN,
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1", DISABLE_AUTOUPDATER="1",
    )  # fmt: skip
    assert said.strip() == "Hello from the scripted model."


def test_codex_asks(brief: str, tmp_path: Path) -> None:
    (tmp_path / ".codex").mkdir()
    provider = (
        f'[model_providers.own]\nname = "own"\nbase_url = "{brief}/v1"\nenv_key = "KEY"\nwire_api = "responses"\n'
    )
    (tmp_path / ".codex" / "config.toml").write_text(f'model = "model"\nmodel_provider = "own"\n{provider}')
    said = run_program("codex", ["exec", "--skip-git-repo-check", "Say hello"], tmp_path, KEY=TOKEN)
    assert said.strip() == "Hello from the scripted model."


@pytest.fixture
def url(open_pipeline: Callable[..., InferencePipeline], tmp_path: Path) -> Iterator[str]:
    """Serves a model that thinks, speaks and calls."""
    with ExitStack() as opened:
        build_scripted(tmp_path, "[/INST]", CALLS, TEMPLATE, special=TOKENS)
        port = opened.enter_context(serving(create_app(open_pipeline(tmp_path, api__token=TOKEN))))
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def name(url: str) -> str:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN) as client:
        return client.models.list().data[0].id


def test_openais_client_reads_responses(url: str, name: str) -> None:
    tools: Any = [{"type": "function", "name": "weather", "parameters": SCHEMA, "strict": False}]
    with openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0, timeout=60) as client:
        answer = client.responses.create(model=name, input=ASKED, tools=tools, temperature=0)
        with client.responses.stream(model=name, input=ASKED, tools=tools, temperature=0) as stream:
            kinds = [event.type for event in stream]
            streamed: Any = stream.get_final_response()
        response: Any
        for response in (answer, streamed):
            thoughts, message, call = response.output
            assert thoughts.content[0].text == "Which city?"
            assert (response.output_text, message.type) == ("I look.", "message")
            assert json.loads(call.arguments) == {"city": "Oslo"}
            assert response.usage is not None and response.usage.output_tokens > 5
        assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
        assert client.responses.retrieve(streamed.id).output_text == "I look."
        result: Any = {"type": "function_call_output", "call_id": streamed.output[2].call_id, "output": "rain"}
        later = client.responses.create(model=name, input=[result], previous_response_id=streamed.id)
        assert later.status == "completed"
        assert [item.type for item in client.responses.input_items.list(later.id)] == ["function_call_output"]
        client.responses.delete(later.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(later.id)
        with pytest.raises(openai.BadRequestError):
            client.responses.cancel(streamed.id)


def test_anthropics_client_reads_messages(url: str, name: str) -> None:
    anthropic = pytest.importorskip("anthropic")
    asked = {
        "model": name, "max_tokens": 400, "messages": ASKED, "system": "Be brief.",
        "tools": [{"name": "weather", "description": "d", "input_schema": SCHEMA}],
    }  # fmt: skip
    with anthropic.Anthropic(base_url=url, api_key=TOKEN, max_retries=0, timeout=60) as client:
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            kinds = [event.type for event in stream]
            streamed = stream.get_final_message()
        for message in (whole, streamed):
            thoughts, text, call = message.content
            assert (thoughts.thinking, text.text, call.name, call.input) == (
                "Which city?", "I look.", "weather", {"city": "Oslo"},
            )  # fmt: skip
            assert message.stop_reason == "tool_use"
        assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
        result = {"type": "tool_result", "tool_use_id": streamed.content[2].id, "content": "rain"}
        history = [*ASKED, {"role": "assistant", "content": streamed.content}, {"role": "user", "content": [result]}]
        assert client.messages.create(**asked | {"messages": history}).stop_reason == "tool_use"
        counted = client.messages.count_tokens(**{key: asked[key] for key in asked if key != "max_tokens"})
        used = whole.usage
        assert counted.input_tokens == used.input_tokens + (used.cache_read_input_tokens or 0)
        with pytest.raises(anthropic.NotFoundError, match="is not served here"):
            client.messages.create(**asked | {"model": "nothing"})
    stranger = anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0)
    with stranger, pytest.raises(anthropic.AuthenticationError):
        stranger.messages.create(**asked)
    with anthropic.Anthropic(base_url=url, auth_token=TOKEN, max_retries=0) as bearer:
        assert bearer.messages.create(**asked).content


def test_ollamas_client_chats(url: str, name: str) -> None:
    ollama = pytest.importorskip("ollama")
    with (
        ollama.Client(host=url, headers={"Authorization": f"Bearer {TOKEN}"}) as client,
        ollama.Client(host=url) as stranger,
    ):
        with pytest.raises(ollama.ResponseError, match="API token"):
            stranger.list()
        ask_ollama(ollama, client, name)


def ask_ollama(ollama: Any, client: Any, name: str) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "description": "d", "parameters": SCHEMA}}]
    whole = client.chat(name, ASKED, tools=tools, options={"temperature": 0})
    parts = list(client.chat(name, ASKED, tools=tools, stream=True))
    assert "".join(part.message.content or "" for part in parts) == whole.message.content == "I look."
    assert "".join(part.message.thinking or "" for part in parts) == whole.message.thinking == "Which city?"
    calls = [call for part in parts for call in part.message.tool_calls or ()]
    for call in (calls[0], whole.message.tool_calls[0]):
        assert (call.function.name, call.function.arguments) == ("weather", {"city": "Oslo"})
    assert (parts[-1].done, parts[-1].done_reason) == (True, "stop")
    history = [*ASKED, whole.message, {"role": "tool", "tool_name": "weather", "content": "rain"}]
    assert client.chat(name, history).message.content
    answer = client.generate(name, "Hi", system="Be brief.")
    assert answer.response.startswith("I look.")
    assert "".join(part.response for part in client.generate(name, "Hi", system="Be brief.", stream=True)) == (
        answer.response
    )
    assert [model.model for model in client.list().models] == [name]
    assert [model.model for model in client.ps().models] == [name]
    assert client.show(name).capabilities == ["completion", "tools", "thinking"]
    with pytest.raises(ollama.ResponseError, match="is not served here"):
        client.chat("nothing", ASKED)
