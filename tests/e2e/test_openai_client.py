"""The `openai` package's own client against the live server."""

from __future__ import annotations

import math

import openai
import pytest
from e2e.conftest import Server

MODEL = "vramancer-demo"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_chat_answers_sensibly(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_streams_the_same_text(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons.count("stop") == 1
    assert reasons[-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_repeated_prompt_is_reported_as_cached(client: openai.OpenAI) -> None:
    prompt = "Once upon a time there was a small cat that lived in a green house by the sea. " * 4
    for _ in range(2):
        answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=2, temperature=0)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    cached = answer.usage.prompt_tokens_details.cached_tokens or 0
    assert 0 < cached < answer.usage.prompt_tokens


def test_completions_stream_and_take_token_ids(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model=MODEL, prompt=[5, 6, 7], max_tokens=6, stream=True, temperature=0))
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    whole = client.completions.create(model=MODEL, prompt=[5, 6, 7], max_tokens=6, temperature=0)
    assert text == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")


def test_several_prompts_and_samples_are_indexed_prompt_by_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=["Count from 1", "The capital of"], n=2, max_tokens=4, temperature=0
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == answer.choices[1].text
    assert answer.choices[0].text != answer.choices[2].text


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, logprobs=True, top_logprobs=3, max_completion_tokens=4
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 4
    for item in logprobs.content:
        assert item.logprob <= 0
        assert len(item.top_logprobs) == 3
        assert item.top_logprobs[0].logprob == pytest.approx(item.logprob, abs=1e-5), "greedy takes the likeliest"
    joined = b"".join(bytes(item.bytes or []) for item in logprobs.content).decode()
    assert joined.strip() == (answer.choices[0].message.content or "").strip()


def test_completion_logprobs_with_echo(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="The capital of France is", echo=True, logprobs=2, max_tokens=2, temperature=0
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.text_offset is not None
    assert answer.choices[0].text.startswith("The capital of France is")
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert len(logprobs.tokens) == len(logprobs.text_offset) == len(logprobs.token_logprobs)


def test_stop_strings_never_appear(client: openai.OpenAI) -> None:
    free = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Count from 1 to 10."}], temperature=0
    ).choices[0].message.content or ""  # fmt: skip
    assert "5" in free
    stopped = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Count from 1 to 10."}], temperature=0, stop=["5"]
    )
    assert stopped.choices[0].message.content == free[: free.index("5")]
    assert stopped.choices[0].finish_reason == "stop"


def test_a_seed_repeats_and_n_differs(client: openai.OpenAI) -> None:
    def ask(seed: int) -> list[str | None]:
        answer = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Tell me a short story."}], seed=seed, n=3,
            temperature=1.0, max_tokens=24,
        )  # fmt: skip
        return [choice.message.content for choice in answer.choices]

    assert ask(7) == ask(7)
    assert len(set(ask(7))) > 1


def test_models(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert {MODEL, "demo", "tiny"} <= set(names)
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-nothing")
    alias = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0)
    assert alias.model in (MODEL, "demo")


def test_errors_are_the_clients_own_types(server: Server, client: openai.OpenAI) -> None:
    with server.client("wrong-token") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-nothing", messages=QUESTION)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt=[5] * 5000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(
            model=MODEL, messages=QUESTION, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    assert "no place for tools" in str(tools.value)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=-1)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt="a", extra_body={"guided_regex": "("})


def test_temperature_one_logprobs_are_finite(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=1, logprobs=True, top_logprobs=20, max_tokens=8
    )
    assert answer.choices[0].logprobs is not None
    for item in answer.choices[0].logprobs.content or []:
        assert math.isfinite(item.logprob)


def test_embeddings_of_the_bundled_model_are_alike_for_like_questions(client: openai.OpenAI) -> None:
    """The client asks for base64 unless it is told otherwise."""
    texts = ["How do I start the server?", "Which command starts the API server?", "What is the capital of France?"]
    answer = client.embeddings.create(model="vramancer-demo-embedding", input=texts)
    start, command, capital = (each.embedding for each in answer.data)
    assert sum(a * b for a, b in zip(start, command, strict=True)) > 0.2
    assert sum(a * b for a, b in zip(start, command, strict=True)) > sum(
        a * b for a, b in zip(start, capital, strict=True)
    )
    plain = client.embeddings.create(model="vramancer-demo-embedding", input=texts[0], encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(start, abs=1e-6)
    short = client.embeddings.create(model="vramancer-demo-embedding", input=[5, 6, 7], dimensions=16)
    assert len(short.data[0].embedding) == 16
    assert short.usage.prompt_tokens == 3
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="text-embedding-3-small", input="a")
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model="vramancer-demo-embedding", input="")
    assert refused.value.param == "input"
