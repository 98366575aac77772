"""Pipelines and servers as answerers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from cli.fake_server import events, serves

from core.errors import UnavailableError
from core.parsers.families import OutputFormat
from core.request import RequestOutput, SamplingParams, SequenceDelta
from vramancer.cli.chat.answerer import LocalAnswerer, Message, Piece, RemoteAnswerer, Sampling
from vramancer.cli.client import ApiClient

HI: list[Message] = [{"role": "user", "content": "Hi"}]


class Submitted(Exception):
    """What a pipeline was asked for."""


class Asked:
    """A pipeline's surface, as far as a conversation needs it."""

    def __init__(self, **defaults: object) -> None:
        tokenizer = SimpleNamespace(encode_chat=lambda messages, add_generation_prompt, context: [len(messages)])
        self.model = SimpleNamespace(
            name="tiny", generation_defaults=defaults, tokenizer=tokenizer, max_model_len=64,
            knows=lambda name: name in ("tiny", "org/tiny"), output_format=OutputFormat(),
        )  # fmt: skip
        self.loads: list[str] = []

    def submit(self, prompt: list[int], params: SamplingParams) -> None:
        raise Submitted(prompt, params)

    def load(self, model: str) -> None:
        self.loads.append(model)


@pytest.mark.parametrize(
    ("defaults", "sampling", "params"),
    [
        ({}, {}, SamplingParams()),
        ({"temperature": 0.6, "not_ours": 1}, {}, SamplingParams(temperature=0.6)),
        ({"temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0}, SamplingParams(temperature=0.0, top_p=0.9)),
        ({}, {"max_tokens": 5}, SamplingParams(max_tokens=5)),
    ],
)
def test_what_is_asked_for_here_goes_before_the_models_own(
    defaults: dict[str, object], sampling: Sampling, params: SamplingParams
) -> None:
    answerer = LocalAnswerer(Asked(**defaults))  # type: ignore[arg-type]
    with pytest.raises(Submitted) as asked:
        next(answerer.answer(HI, sampling))
    assert asked.value.args == ([1], params)


class Handle:
    """A request under way: two tokens in one output, then one more."""

    def __init__(self) -> None:
        self.aborted = 0

    def __iter__(self) -> Iterator[RequestOutput]:
        yield RequestOutput("r", (SequenceDelta(0, "a", (1,)), SequenceDelta(0, "b", (2,))), 1)
        yield RequestOutput("r", (SequenceDelta(0, "c", (3,), finish_reason="length"),), 1, finished=True)

    def abort(self) -> None:
        self.aborted += 1


def test_thoughts_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, asked = Asked(), []
    pipeline.model.output_format = OutputFormat(None, "think", {}, {"<think>": 7, "</think>": 8})
    pipeline.model.tokenizer.decode = lambda ids, skip_special_tokens: "<think>"

    def submit(prompt: list[int], params: SamplingParams) -> Any:
        asked.append(params)
        yield RequestOutput("r", (SequenceDelta(0, "ab", (1,)), SequenceDelta(0, "c</th", (2,))), 1)
        yield RequestOutput("r", (SequenceDelta(0, "ink>", (3,)),), 1)
        yield RequestOutput("r", (SequenceDelta(0, "d <", (3,), finish_reason="stop"),), 1, finished=True)

    class Outputs:
        def __init__(self, *given: Any) -> None:
            self._outputs = submit(*given)

        def __iter__(self) -> Iterator[RequestOutput]:
            return self._outputs

        def abort(self) -> None: ...

    monkeypatch.setattr(pipeline, "submit", Outputs)
    pieces = list(LocalAnswerer(pipeline).answer(HI, {}))  # type: ignore[arg-type]
    assert pieces == [Piece("", 2), Piece("", 3), Piece("d <", 4, "stop")]
    assert sorted(asked[0].kept_special_tokens) == [7, 8]


def test_a_pipelines_answer_comes_in_pieces_with_their_count(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, handle = Asked(), Handle()
    monkeypatch.setattr(pipeline, "submit", lambda prompt, params: handle)
    answer = LocalAnswerer(pipeline).answer(HI, {})  # type: ignore[arg-type]
    assert next(answer) == Piece("ab", 2)
    assert next(answer) == Piece("c", 3, "length")


def test_an_answer_that_is_closed_is_no_longer_made(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, handle = Asked(), Handle()
    monkeypatch.setattr(pipeline, "submit", lambda prompt, params: handle)
    answer = LocalAnswerer(pipeline).answer(HI, {})  # type: ignore[arg-type]
    next(answer)
    assert handle.aborted == 0
    answer.close()
    assert handle.aborted == 1


def test_only_another_model_is_loaded_here() -> None:
    pipeline = Asked()
    answerer = LocalAnswerer(pipeline)  # type: ignore[arg-type]
    answerer.switch("org/tiny")
    answerer.switch("other")
    assert pipeline.loads == ["other"]


def test_a_servers_answer_comes_in_pieces_with_their_count(server: Any) -> None:
    serves(server, "tiny", "Hel", "lo")
    answerer = RemoteAnswerer(ApiClient(server.url, None), None)
    pieces = list(answerer.answer(HI, {"top_k": 3}))
    assert pieces == [Piece("Hel", 1), Piece("lo", 2), Piece("", 2, "stop"), Piece("", 2)]
    assert json.loads(server.seen[-1][3]) == {
        "model": "tiny", "stream": True, "messages": HI, "top_k": 3,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }  # fmt: skip


def test_a_server_that_counts_nothing(server: Any) -> None:
    serves(server, "tiny")
    server.answers["/v1/chat/completions"] = (
        200, events({"choices": [{"delta": {"content": "x"}}]}) + b"data: [DONE]\n\n"
    )  # fmt: skip
    assert list(RemoteAnswerer(ApiClient(server.url, None), "tiny").answer(HI, {})) == [Piece("x", None)]


def test_a_server_without_a_model(server: Any) -> None:
    server.answers["/v1/models"] = (200, b'{"data": []}')
    with pytest.raises(UnavailableError, match="none is loaded there"):
        RemoteAnswerer(ApiClient(server.url, None), None)


def test_a_server_switches_by_name_and_loads_what_it_does_not_serve(server: Any) -> None:
    serves(server, "org/tiny")
    server.answers["/api/models/load"] = (200, b'{"id": "other"}')
    answerer = RemoteAnswerer(ApiClient(server.url, None), "x")
    assert answerer.serves("org/tiny")
    assert not answerer.serves("other")
    answerer.switch("org/tiny")
    assert answerer.model_name == "org/tiny"
    assert "/api/models/load" not in {seen[1] for seen in server.seen}
    answerer.switch("other")
    assert answerer.model_name == "other"
    assert server.seen[-1][3] == b'{"model": "other"}'
