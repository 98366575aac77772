"""Whatever a client sends wrong is a 4xx in OpenAI's shape that names the parameter, and nothing is submitted."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from api_client import ApiClient, openai_error
from fake_pipeline import CONTEXT, VOCAB, FakePipeline, fake_model

from core.api import create_app
from core.api.body import MAX_DEPTH, parse_object
from core.api.sampling import check_token_ids
from core.errors import (
    CircuitOpenError,
    EngineDeadError,
    InsufficientMemoryError,
    InvalidRequestError,
    QueueFullError,
    UnavailableError,
    VRAMancerError,
)
from core.request import SamplingParams

POST_ROUTES = {
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/batch/completions": {"prompts": ["a"]},
    "/api/generate": {"prompt": "a"},
    "/api/infer": {"token_ids": [1]},
    "/v1/embeddings": {"input": "a"},
    "/v1/rerank": {"query": "a", "documents": ["b"]},
    "/v1/score": {"text_1": "a", "text_2": ["b"]},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [97]},
    "/api/models/load": {"model": "demo"},
}
OLLAMAS: dict[str, Any] = {
    "/api/generate": {"prompt": "a"},
    "/api/chat": {"model": "demo", "messages": [{"role": "user", "content": "a"}]},
    "/api/show": {"model": "demo"},
    "/api/embed": {"model": "demo", "input": "a"},
}
"""Routes whose clients do not say that they send JSON."""
GENERATING = ["/v1/completions", "/v1/chat/completions", "/v1/batch/completions", "/api/generate"]

each_route = pytest.mark.parametrize("path", POST_ROUTES)
each_generating = pytest.mark.parametrize("path", GENERATING)

NOT_STRICT_JSON = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b'{"model": "\xff"}',
    b'{"model": "demo", "model": "demo"}',
    b'{"x": NaN}',
    b'{"x": -Infinity}',
    b'{"x": [1e999]}',
    b'{"model": "\\ud800"}',
    b'{"x": {"\\udfff": 1}}',
    b'{"x": ' + b"9" * 5000 + b"}",
    b'{"x": ' + b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1) + b"}",
    b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"x": ' * 100_000 + b"1" + b"}" * 100_000,
]

each_bad_json = pytest.mark.parametrize("data", NOT_STRICT_JSON, ids=lambda data: repr(data[:40]))


@each_route
def test_the_good_request_passes(client: ApiClient, path: str) -> None:
    assert client.post(path, POST_ROUTES[path]).status_code == 200


@each_route
@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "multipart/form-data", "application/json; charset=latin-1"]
)
def test_wrong_content_type(client: ApiClient, path: str, content_type: str | None) -> None:
    data = json.dumps(POST_ROUTES[path]).encode()
    if path in OLLAMAS and content_type is None:
        assert client.post(path, data=data).status_code == 200
        return
    error = client.error(path, status=415, data=data, content_type=content_type)
    assert error["code"] == "unsupported_media_type"


@pytest.mark.parametrize("path", OLLAMAS)
def test_ollamas_routes_take_what_curl_sends_of_itself(client: ApiClient, path: str) -> None:
    """As the examples of Ollama's documentation do."""
    body = json.dumps(OLLAMAS[path])
    assert client.post(path, data=body, content_type="application/x-www-form-urlencoded").status_code == 200
    assert client.raw.post(path, data=body).status_code == 401, "a token is needed all the same"


def test_compressed_body(client: ApiClient) -> None:
    client.error("/tokenize", {"prompt": "a"}, status=415, headers={"Content-Encoding": "gzip"})


@each_route
@each_bad_json
def test_what_is_not_strict_json(client: ApiClient, path: str, data: bytes) -> None:
    error = client.error(path, status=400, data=data, content_type="application/json")
    assert error["type"] == "invalid_request_error"


@each_bad_json
def test_each_of_these_is_refused_for_itself(data: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        parse_object(data)


def test_good_json_is_read_as_it_is() -> None:
    deep: Any = 1
    for _ in range(MAX_DEPTH - 1):
        deep = [deep]
    body = {"pair": "\U0001f600", "deep": deep, "x": 1.5, "€": None}
    assert parse_object(json.dumps(body).encode()) == body
    with pytest.raises(InvalidRequestError):
        parse_object(json.dumps({"deep": [deep]}).encode())


@each_route
def test_huge_body_is_refused_before_it_is_read(client: ApiClient, path: str) -> None:
    data = b'{"prompt": "' + b"a" * 20_000_000 + b'"}'
    error = client.error(path, status=413, data=data, content_type="application/json")
    assert error["code"] == "payload_too_large"


def test_a_body_too_long_by_a_byte_is_told_both_lengths(make_pipeline: Callable[..., FakePipeline]) -> None:
    client = ApiClient(create_app(make_pipeline(api__max_body_bytes=2048)))  # type: ignore[arg-type]
    data = b'{"prompt": "a"}'.ljust(2048)
    assert client.post("/tokenize", data=data, content_type="application/json").status_code == 200
    error = client.error("/tokenize", status=413, data=data + b" ", content_type="application/json")
    assert error["message"] == "The body has 2049 bytes; this server accepts 2048."


@each_generating
def test_unknown_model(client: ApiClient, pipeline: FakePipeline, path: str) -> None:
    error = client.error(path, {**POST_ROUTES[path], "model": "gpt-99"}, status=404)
    assert (error["code"], error["param"], error["type"]) == ("model_not_found", "model", "invalid_request_error")


@each_generating
def test_no_model_is_loaded(client: ApiClient, pipeline: FakePipeline, path: str) -> None:
    pipeline.fake_model = None
    response = client.post(path, POST_ROUTES[path])
    assert response.status_code == 503
    assert openai_error(response)["code"] == "model_not_loaded"
    assert response.headers["Retry-After"]


SAMPLING_ERRORS: list[tuple[str, Any]] = [
    ("n", 0),
    ("n", 129),
    ("n", "1"),
    ("n", True),
    ("n", 1.5),
    ("n", 10**30),
    ("best_of", -1),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", "0"),
    ("temperature", True),
    ("temperature", 10**400),
    ("top_p", -0.1),
    ("top_p", 1.1),
    ("top_k", -2),
    ("top_k", 2**40),
    ("min_p", -1),
    ("presence_penalty", 3),
    ("frequency_penalty", -3),
    ("repetition_penalty", 0),
    ("repetition_penalty", 11),
    ("seed", 2**63),
    ("seed", 1.5),
    ("max_tokens", -1),
    ("max_tokens", 2**31),
    ("max_tokens", 10**30),
    ("max_tokens", 1.5),
    ("max_tokens", 1e30),
    ("min_tokens", -1),
    ("min_tokens", 2**31),
    ("stop", ["x"] * 5000),
    ("stop", ["x" * 5000]),
    ("stop", [""]),
    ("stop", [1]),
    ("stop", {"a": 1}),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [VOCAB]),
    ("stop_token_ids", ["1"]),
    ("stop_token_ids", [1] * 5000),
    ("stop_token_ids", 1),
    ("logit_bias", {"a": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {str(VOCAB): 1}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {"1": "1"}),
    ("logit_bias", [1]),
    ("ignore_eos", 1),
    ("stream", "true"),
    ("priority", 2**40),
    ("model", 3),
]


@each_generating
@pytest.mark.parametrize(("name", "value"), SAMPLING_ERRORS, ids=lambda value: str(value)[:24])
def test_sampling_parameters_out_of_range(
    client: ApiClient, pipeline: FakePipeline, path: str, name: str, value: Any
) -> None:
    error = client.error(path, {**POST_ROUTES[path], name: value}, status=400)
    assert error["param"].split("[")[0].split(".")[0] == name
    assert len(error["message"]) < 500
    assert not pipeline.submitted


@each_generating
@pytest.mark.parametrize(
    ("name", "value"),
    [("n", 0), ("best_of", 129), ("temperature", 2.1), ("top_p", 2), ("top_k", 2**40), ("min_p", -1.0), ("seed", 2**63),
     ("repetition_penalty", 0), ("presence_penalty", 3), ("min_tokens", 2**31), ("max_tokens", 2**31), ("stop", ("",)),
     ("stop_token_ids", (VOCAB,)), ("logit_bias", {1: 101.0})],
)  # fmt: skip
def test_what_is_out_of_range_is_said_in_one_place(client: ApiClient, path: str, name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        SamplingParams(**{name: value}).validate(VOCAB)
    sent = {str(key): bias for key, bias in value.items()} if isinstance(value, dict) else value
    error = client.error(path, {**POST_ROUTES[path], name: sent}, status=400)
    assert (error["message"].replace(".0", ""), error["param"]) == (refused.value.message.replace(".0", ""), name)


@each_generating
@pytest.mark.parametrize("name", ["n", "best_of", "max_tokens", "min_tokens", "seed", "top_k", "temperature", "top_p"])
@pytest.mark.parametrize("value", [10**400, -(10**400)], ids=["huge", "minus-huge"])
def test_numbers_without_end_are_out_of_range(client: ApiClient, path: str, name: str, value: int) -> None:
    error = client.error(path, {**POST_ROUTES[path], name: value}, status=400)
    assert error["param"] == name
    assert len(error["message"]) < 200


def test_a_parameter_is_called_what_the_client_calls_it(client: ApiClient) -> None:
    chat = POST_ROUTES["/v1/chat/completions"]
    for name, value, also in (("top_logprobs", 21, {"logprobs": True}), ("max_completion_tokens", 0, {})):
        error = client.error("/v1/chat/completions", {**chat, **also, name: value}, status=400)
        assert error["param"] == name
        assert error["message"].startswith(f"{name} must lie between")


@each_generating
def test_contradictions(client: ApiClient, path: str) -> None:
    base = POST_ROUTES[path]
    assert client.error(path, {**base, "n": 3, "best_of": 2}, status=400)["param"] == "best_of"
    assert client.error(path, {**base, "min_tokens": 9, "max_tokens": 5}, status=400)["param"] == "min_tokens"


@pytest.mark.parametrize("value", [-1, 21, "1", True, 1.5])
def test_logprobs_out_of_bounds(client: ApiClient, value: Any) -> None:
    assert client.error("/v1/completions", {"prompt": "a", "logprobs": value}, status=400)["param"] == "logprobs"
    assert client.error("/api/generate", {"prompt": "a", "logprobs": value}, status=400)["param"] == "logprobs"


@pytest.mark.parametrize(
    "prompt", [None, "", [], [""], [[]], ["a", ""], 3, {"a": 1}, True, [1.5], [True], ["a", 1], [[1], "a"], [["a"]]]
)
def test_prompts_that_are_none(client: ApiClient, pipeline: FakePipeline, prompt: Any) -> None:
    assert client.error("/v1/completions", {"prompt": prompt}, status=400)["param"] == "prompt"
    assert not pipeline.submitted


def test_prompt_is_absent(client: ApiClient) -> None:
    assert client.error("/v1/completions", {}, status=400)["param"] == "prompt"
    assert client.error("/v1/batch/completions", {}, status=400)["param"] == "prompts"
    assert client.error("/api/generate", {}, status=400)["param"] == "prompt"


@pytest.mark.parametrize("token", [-1, VOCAB, 2**63, 10**40])
def test_token_ids_out_of_range(client: ApiClient, token: int) -> None:
    assert client.error("/v1/completions", {"prompt": [1, token]}, status=400)["param"] == "prompt"
    assert client.error("/v1/batch/completions", {"prompts": [[1], [token]]}, status=400)["param"] == "prompts"
    assert client.error("/api/generate", {"prompt_token_ids": [token]}, status=400)["param"] == "prompt_token_ids"
    assert client.error("/api/infer", {"token_ids": [token]}, status=400)["param"] == "token_ids"
    assert client.error("/detokenize", {"tokens": [token]}, status=400)["param"] == "tokens"


def test_the_range_of_token_ids_that_is_told_is_the_one_that_is_taken() -> None:
    model = fake_model()
    assert check_token_ids([0, VOCAB - 1], model, param="tokens") == [0, VOCAB - 1]
    for wrong in (-1, VOCAB):
        with pytest.raises(InvalidRequestError) as refused:
            check_token_ids([1, wrong], model, param="tokens")
        assert refused.value.message == f"tokens: token ids lie between 0 and {VOCAB - 1}."


def test_priorities_and_context_lengths_are_at_most_32_bits_wide(client: ApiClient, pipeline: FakePipeline) -> None:
    most = 2**31 - 1
    for priority in (-most, most):
        assert client.post("/api/generate", {"prompt": "a", "priority": priority}).status_code == 200
    for priority in (-most - 1, most + 1):
        error = client.error("/api/generate", {"prompt": "a", "priority": priority}, status=400)
        assert error["param"] == "priority"
    assert pipeline.priorities == [-most, most]
    load = {"model": "demo", "max_model_len": most + 1}
    assert client.error("/api/models/load", load, status=400)["param"] == "max_model_len"
    assert client.post("/api/models/load", {**load, "max_model_len": most}).status_code == 200


@each_generating
def test_prompt_longer_than_the_context(client: ApiClient, path: str) -> None:
    long = "a" * CONTEXT
    bodies: dict[str, Any] = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": long}]},
        "/v1/batch/completions": {"prompts": ["a", long]},
    }
    error = client.error(path, bodies.get(path, {"prompt": long}), status=400)
    assert error["code"] == "context_length_exceeded"


def test_more_tokens_than_the_context_has(client: ApiClient) -> None:
    error = client.error("/v1/completions", {"prompt": "a", "max_tokens": CONTEXT}, status=400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")


def test_too_many_prompts(make_pipeline: Callable[..., FakePipeline]) -> None:
    client = ApiClient(create_app(make_pipeline(api__max_batch_prompts=2)))  # type: ignore[arg-type]
    assert client.error("/v1/completions", {"prompt": ["a"] * 3}, status=400)["param"] == "prompt"
    assert client.error("/v1/batch/completions", {"prompts": ["a"] * 3}, status=400)["param"] == "prompts"


def test_suffix_is_not_supported(client: ApiClient) -> None:
    error = client.error("/v1/completions", {"prompt": "a", "suffix": "b"}, status=400)
    assert (error["code"], error["param"]) == ("unsupported_parameter", "suffix")


@each_generating
def test_best_of_above_n_cannot_stream(client: ApiClient, path: str) -> None:
    error = client.error(path, {**POST_ROUTES[path], "best_of": 2, "stream": True}, status=400)
    assert error["param"] in ("best_of", "stream")


@pytest.mark.parametrize(
    ("refusal", "status", "retry_after"),
    [
        (QueueFullError("Full.", retry_after_s=2.2), 429, "3"),
        (UnavailableError("Not now.", retry_after_s=0.1), 503, "1"),
        (CircuitOpenError("Open."), 503, "5"),
        (EngineDeadError("Dead.", retry_after_s=None), 503, None),
        (InsufficientMemoryError("Too big.", lacking_bytes={"cpu:0": 7}), 400, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_of_the_engine_are_plain_answers_before_any_stream(
    client: ApiClient,
    pipeline: FakePipeline,
    refusal: VRAMancerError,
    status: int,
    retry_after: str | None,
    stream: bool,
) -> None:
    pipeline.refusal = refusal
    response = client.post("/v1/completions", {"prompt": "a", "stream": stream})
    assert response.status_code == status
    assert openai_error(response)["code"] == refusal.code
    assert response.headers.get("Retry-After") == retry_after


def test_unknown_route_and_wrong_method(client: ApiClient) -> None:
    response = client.get("/v1/nothing")
    assert response.status_code == 404
    assert openai_error(response)["code"] == "not_found"
    response = client.get("/v1/completions")
    assert response.status_code == 405
    assert openai_error(response)["code"] == "method_not_allowed"
    assert "POST" in response.headers["Allow"]


def test_a_bug_is_a_500_that_tells_nothing(
    client: ApiClient, pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(pipeline, "submit_many", broken)
    error = client.error("/v1/completions", {"prompt": "a"}, status=500)
    assert error["code"] == "internal_error"
    assert "secret" not in error["message"]


def test_what_a_client_sends_is_not_echoed_at_length(client: ApiClient) -> None:
    long = "x" * 100_000
    for body in ({"prompt": "a", "model": long}, {"prompt": "a", long: 1}):
        error = client.error("/api/generate", body, status=400)
        assert len(json.dumps(error)) < 1000


@pytest.mark.parametrize("path", ["/api/generate", "/api/infer", "/api/models/load"])
def test_our_own_routes_refuse_fields_they_do_not_know(client: ApiClient, path: str) -> None:
    assert client.error(path, {**POST_ROUTES[path], "max_new_tokens": 3}, status=400)["param"] == "max_new_tokens"
