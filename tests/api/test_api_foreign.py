"""Parameters that OpenAI's clients and those of other servers send: honoured, without effect, or refused by name."""

from __future__ import annotations

import typing
from dataclasses import replace
from typing import Any

import pytest
from api_client import ApiClient
from fake_pipeline import CONTEXT, FakePipeline
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params
from pydantic import BaseModel

from core.api import management, memory, native, tokens
from core.api.body import RequestModel
from core.api.openai import schemas, unsupported

COMPLETIONS, CHAT, BATCH = "/v1/completions", "/v1/chat/completions", "/v1/batch/completions"
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "a"},
    CHAT: {"messages": [{"role": "user", "content": "a"}]},
    BATCH: {"prompts": ["a"]},
}

each_route = pytest.mark.parametrize("path", BODIES)


# ---- OpenAI's own ------------------------------------------------------------------------------------------------

WITHOUT_EFFECT: list[dict[str, Any]] = [
    {"user": "u", "safety_identifier": "s", "metadata": {"a": "b"}, "store": True},
    {"service_tier": "priority", "prompt_cache_key": "k", "prompt_cache_retention": "24h"},
    {"reasoning_effort": "none", "verbosity": "low", "reasoning": {"effort": "low"}},
    {"prediction": {"type": "content", "content": "a"}, "parallel_tool_calls": False},
    {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("extra", WITHOUT_EFFECT)
def test_what_does_not_change_the_answer_is_accepted(
    client: ApiClient, pipeline: FakePipeline, path: str, extra: dict[str, Any]
) -> None:
    client.post(path, BODIES[path])
    assert client.post(path, {**BODIES[path], **extra}).status_code == 200
    assert pipeline.submitted[1] == pipeline.submitted[0]


NO_EFFECT = {
    "metadata", "prediction", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user", "verbosity",
}  # fmt: skip


@pytest.mark.parametrize(
    ("schema", "parameters"),
    [
        (schemas.ChatRequest, chat_params.CompletionCreateParamsBase),
        (schemas.CompletionRequest, text_params.CompletionCreateParamsBase),
    ],
)
def test_every_parameter_of_openais_client_is_known(schema: type[RequestModel], parameters: Any) -> None:
    known = set(schema.model_fields) | set(schema.unsupported) | NO_EFFECT
    assert set(parameters.__annotations__) >= {"model", "seed", "stop"}
    assert set(parameters.__annotations__) - known == set()


@each_route
@pytest.mark.parametrize(
    ("extra", "seen"),
    [
        ({"top_p": 0}, ("top_p", 0.0)),
        ({"best_of": 0}, ("best_of", None)),
        ({"stop": ""}, ("stop", ())),
        ({"stop": []}, ("stop", ())),
        ({"logit_bias": {}}, ("logit_bias", {})),
    ],
)
def test_openais_edge_values(
    client: ApiClient, pipeline: FakePipeline, path: str, extra: dict[str, Any], seen: tuple[str, Any]
) -> None:
    assert client.post(path, {**BODIES[path], **extra}).status_code == 200
    name, value = seen
    assert getattr(pipeline.submitted[0][1], name) == value


def test_an_empty_stop_string_among_others_is_still_an_error(client: ApiClient) -> None:
    assert client.error(COMPLETIONS, {"prompt": "a", "stop": ["x", ""]}, status=400)["param"] == "stop"


@each_route
def test_max_completion_tokens_is_the_newer_name_everywhere(
    client: ApiClient, pipeline: FakePipeline, path: str
) -> None:
    client.post(path, {**BODIES[path], "max_completion_tokens": 2, "max_tokens": 9})
    assert pipeline.submitted[0][1].max_tokens == 2
    error = client.error(path, {**BODIES[path], "max_completion_tokens": -1}, status=400)
    assert (error["param"], error["message"][:22]) == ("max_completion_tokens", "max_completion_tokens ")


@pytest.mark.parametrize("stream", [False, True])
def test_max_tokens_zero_generates_nothing(client: ApiClient, stream: bool) -> None:
    body = {"prompt": "ab", "max_tokens": 0}
    if stream:
        chunks = client.events(COMPLETIONS, body | {"stream_options": {"include_usage": True}})[:-1]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == ""
        answer = {"choices": chunks[-2]["choices"], "usage": chunks[-1]["usage"]}
    else:
        answer = client.post(COMPLETIONS, body).get_json()
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("", "length")
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (3, 0)


# ---- integers ----------------------------------------------------------------------------------------------------


def body_classes() -> list[type[RequestModel]]:
    modules = (schemas, native, tokens, management, memory)
    found = [item for module in modules for item in vars(module).values() if isinstance(item, type)]
    return [item for item in dict.fromkeys(found) if issubclass(item, RequestModel)]


def kinds(annotation: Any) -> set[Any]:
    inner = typing.get_args(annotation)
    return set().union(*map(kinds, inner)) if inner else {annotation}


INTEGER_FIELDS = [
    (schema, name)
    for schema in body_classes()
    for name, field in schema.model_fields.items()
    if int in kinds(field.annotation) and name != "logit_bias"
]


def test_the_integer_fields_are_found() -> None:
    names = {name for _, name in INTEGER_FIELDS}
    assert names >= {"n", "seed", "max_tokens", "top_logprobs", "stop_token_ids", "token_ids", "num_gpus", "bytes"}


@pytest.mark.parametrize(("schema", "name"), INTEGER_FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_every_integer_may_be_written_with_a_point(schema: type[BaseModel], name: str) -> None:
    listed = list in kinds_of_containers(schema.model_fields[name].annotation)
    needed = {"messages": [], "prompts": [], "device": "d", "model": "m", "token_ids": [1], "tokens": [1]}
    base = {key: value for key, value in needed.items() if key in schema.model_fields}
    for good in (3.0, 3):
        read = getattr(schema.model_validate({**base, name: [good] if listed else good}), name)
        assert list(read) == [3] if listed else read == 3
        assert all(type(item) is int for item in (read if listed else [read]))
    for bad in (3.5, True, "3"):
        with pytest.raises(ValueError, match="nteger"):
            schema.model_validate({**base, name: [bad] if listed else bad})


def kinds_of_containers(annotation: Any) -> set[Any]:
    origin = typing.get_origin(annotation)
    nested = set().union(*(kinds_of_containers(item) for item in typing.get_args(annotation)))
    return nested | ({list} if origin in (list, tuple) else set())


@pytest.mark.parametrize(("path", "name"), [(COMPLETIONS, "prompt"), (BATCH, "prompts")])
def test_token_ids_with_a_point(client: ApiClient, pipeline: FakePipeline, path: str, name: str) -> None:
    assert client.post(path, {name: [[97.0, 98], [99.0]]}).status_code == 200
    assert [prompt for prompt, _ in pipeline.submitted] == [[97, 98], [99]]
    assert all(type(token) is int for prompt, _ in pipeline.submitted for token in prompt)
    assert client.error(path, {name: [[97.5]]}, status=400)["param"] == name


# ---- other servers' ----------------------------------------------------------------------------------------------

FOREIGN: dict[str, tuple[Any, Any]] = {
    "num_ctx": (4096, None),
    "num_predict": (5, None),
    "options": ({"temperature": 0}, {}),
    "format": ("json", ""),
    "n_predict": (5, None),
    "n_probs": (3, 0),
    "mirostat": (2, 0.0),
    "typical_p": (0.5, 1),
    "dry_multiplier": (0.8, 0),
    "xtc_probability": (0.5, 0.0),
    "dynatemp_range": (0.5, 0),
    "top_n_sigma": (1.5, -1),
    "repeat_penalty": (1.1, 1.0),
    "samplers": (["top_k"], []),
    "t_max_predict_ms": (5, -1),
    "lora": ([{"id": 0, "scale": 1}], []),
    "structural_tag": ({"a": 1}, None),
    "use_beam_search": (True, False),
    "bad_words": (["x"], []),
    "truncate_prompt_tokens": (5, None),
    "prompt_logprobs": (1, None),
    "regex": ("a+", None),
    "ebnf": ("root ::= x", None),
    "stop_regex": ("a+", ""),
    "no_stop_trim": (True, False),
    "return_hidden_states": (True, False),
    "max_new_tokens": (5, None),
    "do_sample": (False, True),
    "watermark": (True, False),
    "truncate": (5, None),
    "mirostat_mode": (2, 0),
    "tfs": (0.9, 1),
    "top_a": (0.2, 0),
    "smoothing_factor": (0.5, 0),
    "guidance_scale": (1.5, 1),
    "negative_prompt": ("x", ""),
    "no_repeat_ngram_size": (3, 0),
    "ban_eos_token": (True, False),
    "custom_token_bans": ("1,2", ""),
    "truncation_length": (2048, 0),
    "system": ("Be brief.", ""),
    "extra_body": ({"top_k": 1}, {}),
    "enable_thinking": (False, None),
    "thinking_budget_tokens": (0, -1),
    "reasoning_budget": (0, -1),
    "min_keep": (2, 0),
}  # fmt: skip


@each_route
@pytest.mark.parametrize("name", FOREIGN)
def test_known_parameters_of_other_servers_are_refused_by_name(
    client: ApiClient, pipeline: FakePipeline, path: str, name: str
) -> None:
    refused, accepted = FOREIGN[name]
    error = client.error(path, {**BODIES[path], name: refused}, status=400)
    assert (error["code"], error["param"]) == ("unsupported_parameter", name)
    assert error["message"].startswith(f"{name} is not supported")
    assert not pipeline.submitted
    for value in (accepted, None):
        assert client.post(path, {**BODIES[path], name: value}).status_code == 200


def test_a_refusal_says_what_is_accepted_and_what_to_use(client: ApiClient) -> None:
    said = client.error(CHAT, {**BODIES[CHAT], "repeat_penalty": 1.1}, status=400)["message"]
    assert said == "repeat_penalty is not supported by this server; 1 alone is accepted; use repetition_penalty."
    said = client.error(CHAT, {**BODIES[CHAT], "num_predict": 1}, status=400)["message"]
    assert said == "num_predict is not supported by this server; use max_tokens."


def test_what_has_two_values_for_off_takes_both_and_no_other(client: ApiClient) -> None:
    off = {"min_keep": (0, 1), "top_n_sigma": (0, -1), "adaptive_target": (0, -1), "t_max_predict_ms": (0, -1)}
    for which in (0, 1):
        body = {"prompt": "a", **{name: values[which] for name, values in off.items()}}
        assert client.post(COMPLETIONS, body).status_code == 200
    for name in off:
        assert client.error(COMPLETIONS, {"prompt": "a", name: 2}, status=400)["param"] == name


def test_true_is_not_one(client: ApiClient) -> None:
    for name, value in (("typical_p", True), ("mirostat", False), ("do_sample", 1)):
        assert client.error(COMPLETIONS, {"prompt": "a", name: value}, status=400)["param"] == name


def test_what_tunes_a_sampler_that_is_off_is_accepted(client: ApiClient) -> None:
    tuning = {"mirostat_tau": 5, "mirostat_eta": 0.1, "dry_base": 1.75, "dry_allowed_length": 2, "xtc_threshold": 0.1}
    assert client.post(COMPLETIONS, {"prompt": "a", "mirostat": 0, **tuning}).status_code == 200


def test_no_parameter_is_both_honoured_and_refused() -> None:
    for schema in (schemas.CompletionRequest, schemas.BatchRequest, schemas.ChatRequest, tokens.TokenizeRequest):
        assert set(schema.unsupported) & set(schema.model_fields) <= {"stream", "stream_options", "echo"}
    assert set(unsupported.INSTEAD) <= set(unsupported.CHAT) | set(unsupported.COMPLETION)


def test_tools_are_counted(client: ApiClient, monkeypatch: pytest.MonkeyPatch, pipeline: FakePipeline) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(pipeline.model.tokenizer, "encode_chat", lambda *_, tools, **__: seen.append(tools) or [1, 2])
    body = {"messages": BODIES[CHAT]["messages"], "tools": [{"type": "function", "function": {"name": "f"}}]}
    assert client.post("/tokenize", body).get_json()["count"] == 2
    assert [tool["function"]["name"] for tool in seen[0]] == ["f"]
    assert client.error("/tokenize", {**body, "tools": [3]}, status=400)["param"] == "tools[0]"


# ---- usage in every chunk ----------------------------------------------------------------------------------------


def used(chunks: list[Any]) -> list[tuple[int, int]]:
    return [(chunk["usage"]["prompt_tokens"], chunk["usage"]["completion_tokens"]) for chunk in chunks]


@pytest.mark.parametrize(("path", "tokens"), [(COMPLETIONS, [1, 2, 3, 4, 5, 5]), (CHAT, [0, 1, 2, 3, 4, 5, 5])])
@pytest.mark.parametrize("last", [False, True])
def test_continuous_usage_counts_up(client: ApiClient, path: str, tokens: list[int], last: bool) -> None:
    options = {"continuous_usage_stats": True, "include_usage": last}
    *chunks, done = client.events(path, {**BODIES[path], "stream_options": options})
    assert done == "[DONE]"
    prompt = chunks[0]["usage"]["prompt_tokens"]
    assert prompt > 1
    assert used(chunks) == [(prompt, number) for number in (tokens + tokens[-1:] if last else tokens)]
    assert (chunks[-1]["choices"] == []) is last


def test_continuous_usage_is_over_all_choices(client: ApiClient) -> None:
    body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 1, "stream_options": {"continuous_usage_stats": True}}
    chunks = client.events(COMPLETIONS, body)[:-1]
    assert used(chunks)[-1] == (4, 4)
    assert [count for _, count in used(chunks)] == sorted(count for _, count in used(chunks))


def test_usage_is_null_in_chunks_that_do_not_say_it(client: ApiClient) -> None:
    chunks = client.events(COMPLETIONS, {"prompt": "a", "stream_options": {"include_usage": True}})[:-1]
    assert {chunk["usage"] for chunk in chunks[:-1]} == {None}


# ---- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "a" * CONTEXT}]}, "messages"),
        (CHAT, {**BODIES[CHAT], "max_completion_tokens": CONTEXT}, "max_completion_tokens"),
        (CHAT, {**BODIES[CHAT], "max_tokens": CONTEXT}, "max_tokens"),
        (COMPLETIONS, {"prompt": "a" * CONTEXT}, "prompt"),
        (COMPLETIONS, {"prompt": "a", "max_completion_tokens": CONTEXT}, "max_completion_tokens"),
        (BATCH, {"prompts": ["a" * CONTEXT]}, "prompts"),
        ("/api/generate", {"prompt_token_ids": [1] * CONTEXT}, "prompt_token_ids"),
        ("/api/generate", {"messages": [{"role": "user", "content": "a" * CONTEXT}]}, "messages"),
    ],
)
def test_a_context_error_names_what_the_client_sent(
    client: ApiClient, path: str, body: dict[str, Any], param: str
) -> None:
    error = client.error(path, body, status=400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)
    assert error["message"].endswith(" (context_length_exceeded)"), "some clients see the message alone"


NAMES = ["demo", "org/demo", "hub/of/demo", "/srv/models/demo/", "srv/models/demo", "/srv/models/demo"]


@pytest.mark.parametrize("name", NAMES)
def test_answers_carry_the_name_that_the_client_used(client: ApiClient, pipeline: FakePipeline, name: str) -> None:
    pipeline.fake_model = replace(pipeline.model, source="/srv/models/demo/", aliases=("org/demo", "hub/of/demo"))
    for path, body in BODIES.items():
        answer = client.post(path, {**body, "model": name}).get_json()
        assert (answer.get("model") or answer["data"][0]["model"]) == name
    assert client.events(CHAT, {**BODIES[CHAT], "model": name})[0]["model"] == name
    assert client.post("/api/generate", {"prompt": "a", "model": name}).get_json()["model"] == name
    assert client.post("/api/infer", {"token_ids": [1], "model": name}).get_json()["model"] == name
