"""Clients as people use them, against the live server. One that is not installed is skipped; none is downloaded.

The packages litellm and langchain-openai are looked for where the tests run, the programs guidellm and aider on PATH.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e.conftest import TOKEN, Server
from e2e.test_live_server import call, wait_until_idle

from core.models.resolve import DEMO_PATH

pytestmark = pytest.mark.filterwarnings("default")  # clients have warnings of their own

MODEL = "vramancer-demo"
SYSTEM = {"role": "system", "content": "You answer briefly."}
QUESTION = [SYSTEM, {"role": "user", "content": "What is the capital of France?"}]
LONG = [{"role": "user", "content": "hello " * 9000}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
CALLED = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"country": "France"}'}}
WITH_CALLS = [
    *QUESTION,
    {"role": "assistant", "content": None, "tool_calls": [CALLED]},
    {"role": "tool", "tool_call_id": "c1", "content": "Paris"},
]


def run_client(command: list[str], directory: Path, **environment: str) -> str:
    """What a program says that has to end well, with a home of its own and no network."""
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, timeout=300, check=False, stdin=subprocess.DEVNULL,
        env={"PATH": os.environ["PATH"], "HOME": str(directory), "HF_HUB_OFFLINE": "1", "TERM": "dumb", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


# ---- litellm -----------------------------------------------------------------------------------------------------


@pytest.fixture
def litellm(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    return pytest.importorskip("litellm")


@pytest.fixture(params=["openai", "hosted_vllm"])
def asked(request: pytest.FixtureRequest, server: Server) -> dict[str, Any]:
    """How litellm is told whom to ask."""
    return {"model": f"{request.param}/{MODEL}", "api_base": f"{server.url}/v1", "api_key": TOKEN, "max_retries": 0}


def test_litellm_chats_and_streams(litellm: Any, asked: dict[str, Any]) -> None:
    whole = litellm.completion(messages=QUESTION, temperature=0, user="u", metadata={"a": "b"}, **asked)
    assert "Paris" in whole.choices[0].message.content
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(litellm.completion(messages=QUESTION, temperature=0, **options, **asked))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_litellm_takes_a_history_with_calls(litellm: Any, asked: dict[str, Any]) -> None:
    answer = litellm.completion(messages=WITH_CALLS, tools=TOOLS, tool_choice="none", **asked)
    assert answer.choices[0].message.tool_calls is None
    with pytest.raises(litellm.BadRequestError, match="no place for tools"):
        litellm.completion(messages=QUESTION, tools=TOOLS, **asked)


@pytest.mark.parametrize("given", [{"messages": LONG}, {"messages": QUESTION, "max_tokens": 100_000}])
def test_litellm_knows_that_the_context_is_full(litellm: Any, asked: dict[str, Any], given: dict[str, Any]) -> None:
    with pytest.raises(litellm.ContextWindowExceededError, match="maximum context length is"):
        litellm.completion(**given, **asked)


def test_litellm_knows_the_other_errors(litellm: Any, asked: dict[str, Any]) -> None:
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(messages=QUESTION, **asked | {"api_key": "wrong"})
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(messages=QUESTION, **asked | {"model": "openai/nothing"})


# ---- langchain ---------------------------------------------------------------------------------------------------


@pytest.fixture
def langchain(server: Server) -> Any:
    """Makes a chat model of langchain's."""
    package = pytest.importorskip("langchain_openai")

    def make(**options: Any) -> Any:
        return package.ChatOpenAI(
            model=MODEL, base_url=f"{server.url}/v1", api_key=TOKEN, max_retries=0, **{"temperature": 0, **options}
        )

    return make


def test_langchain_invokes_streams_and_batches(langchain: Any) -> None:
    answer = langchain().invoke(QUESTION)
    assert "Paris" in answer.content
    chunks = list(langchain(stream_usage=True).stream(QUESTION))
    assert "".join(chunk.content for chunk in chunks) == answer.content
    used = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert [usage["output_tokens"] for usage in used] == [answer.usage_metadata["output_tokens"]]
    assert [item.content for item in langchain().batch([QUESTION, QUESTION])] == [answer.content] * 2
    assert langchain(max_tokens=3).invoke(QUESTION).response_metadata["finish_reason"] == "length"


def test_langchain_sends_what_does_not_change_the_answer(langchain: Any) -> None:
    model = langchain(
        reasoning_effort="none", verbosity="low", service_tier="auto", store=True, metadata={"a": "b"},
        use_responses_api=False,
    )  # fmt: skip
    assert model.invoke(QUESTION).content == langchain().invoke(QUESTION).content


def test_langchain_takes_a_history_with_calls(langchain: Any) -> None:
    messages = pytest.importorskip("langchain_core.messages")
    asked = messages.AIMessage("", tool_calls=[{"name": "f", "args": {"country": "France"}, "id": "c1"}])
    assert langchain().invoke([*QUESTION, asked, messages.ToolMessage("Paris", tool_call_id="c1")]).content


@pytest.mark.parametrize(("messages", "options"), [(LONG, {}), (QUESTION, {"max_tokens": 100_000})])
def test_langchain_knows_that_the_context_is_full(
    langchain: Any, messages: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    errors = pytest.importorskip("langchain_core.exceptions")
    with pytest.raises(errors.ContextOverflowError, match="maximum context length is"):
        langchain(**options).invoke(messages)


def test_langchain_completes_text(langchain: Any, server: Server) -> None:
    model = pytest.importorskip("langchain_openai").OpenAI(
        model=MODEL, base_url=f"{server.url}/v1", api_key=TOKEN, temperature=0, max_tokens=5
    )
    prompt = "The capital of France is"
    assert "Paris" in model.invoke(prompt)
    assert "".join(model.stream(prompt)) == model.invoke(prompt)
    assert model.generate([prompt, "A cat"]).llm_output["token_usage"]["completion_tokens"] == 10


# ---- guidellm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_guidellm_measures(server: Server, tmp_path: Path, path: str) -> None:
    program = shutil.which("guidellm")
    if program is None:
        pytest.skip("guidellm is not installed")
    command = [
        program, "run", "--disable-console",
        "--backend", f"kind=openai_http,target={server.url},api_key={TOKEN},request_format={path}",
        "--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=4",
        "--tokenizer", f"kind=hf_auto,model={DEMO_PATH}",
        "--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8",
        "--output", f"kind=json,path={tmp_path / 'report.json'}",
    ]  # fmt: skip
    run_client(command, tmp_path)
    metrics = json.loads((tmp_path / "report.json").read_text())["benchmarks"][0]["metrics"]
    assert metrics["request_totals"] == {"successful": 4, "errored": 0, "incomplete": 0, "total": 4}
    assert metrics["output_token_count"]["successful"]["min"] == 8
    assert metrics["prompt_token_count"]["successful"]["min"] >= 32


# ---- aider -------------------------------------------------------------------------------------------------------


def test_aider_asks(server: Server, tmp_path: Path) -> None:
    program = shutil.which("aider")
    if program is None:
        pytest.skip("aider is not installed")
    (tmp_path / "a.py").write_text("x = 1\n")
    command = [
        program, "--model", f"openai/{MODEL}", "--chat-mode", "ask", "--map-tokens", "0", "--no-git", "--yes-always",
        "--no-check-update", "--no-show-release-notes", "--no-show-model-warnings", "--analytics-disable",
        "--no-pretty", "--message", "What is the capital of France?",
    ]  # fmt: skip
    local = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    said = run_client(command, tmp_path, OPENAI_API_BASE=f"{server.url}/v1", OPENAI_API_KEY=TOKEN, **local)
    assert "Paris" in said
    assert "Tokens: " in said, "the usage was read"


# ---- a chat in a browser's front end -----------------------------------------------------------------------------


def streamed(server: Server, body: dict[str, Any]) -> Iterator[Any]:
    """Chunks of a streamed chat as they come. Closed early, it leaves."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    headers = {
        "Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json", "Accept": "*/*",
        "X-OpenWebUI-User-Name": "Somebody", "X-OpenWebUI-User-Role": "admin", "HTTP-Referer": "https://openwebui.com/",
        "X-Title": "Open WebUI", "Cookie": "token=of-the-front-end",
    }  # fmt: skip
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body | {"stream": True}), headers)
        response = connection.getresponse()
        assert response.status == 200, response.read()
        assert (response.getheader("Content-Type") or "").startswith("text/event-stream")
        while line := response.readline():
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                yield json.loads(line.removeprefix(b"data: "))
    finally:
        connection.close()


def test_a_session_in_a_browsers_front_end(server: Server) -> None:
    status, models = call(server, "GET", "/v1/models")
    assert status == 200
    assert {"id", "object", "created", "owned_by"} <= set(models["data"][0])
    chat = {"model": models["data"][0]["id"], "messages": QUESTION, "stream_options": {"include_usage": True}}
    settings = {"temperature": 0, "top_p": 0.9, "frequency_penalty": 0, "seed": 0, "stop": ["\n\n"], "max_tokens": 128}
    chunks = list(streamed(server, chat | settings | {"user": "u", "metadata": {"chat_id": "c"}, "verbosity": "low"}))
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
    assert "Paris" in text
    assert chunks[-1]["usage"]["completion_tokens"] > 0

    title = f"### Task:\nGive a title of 3 words.\n<chat_history>\nUSER: Hi\nASSISTANT: {text}\n</chat_history>"
    body = {"model": chat["model"], "messages": [{"role": "user", "content": title}], "stream": False}
    status, answer = call(server, "POST", "/v1/chat/completions", body | {"max_completion_tokens": 50})
    assert status == 200
    assert answer["choices"][0]["message"]["content"]

    longer = [*QUESTION, {"role": "assistant", "content": text}, {"role": "user", "content": "Tell me a story."}]
    running = streamed(server, chat | {"messages": longer, "max_tokens": 1500, "ignore_eos": True})
    next(running)
    running.close()
    wait_until_idle(server)


def test_stop_strings_end_a_streamed_answer(server: Server) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Count from 1 to 10."}], "temperature": 0}
    chunks = list(streamed(server, body | {"stop": ["5"], "stream_options": {"continuous_usage_stats": True}}))
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert "4" in text and "5" not in text
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] == 0
