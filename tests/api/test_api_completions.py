"""`/v1/completions` and `/v1/batch/completions`: answers, streams and parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
from api_client import ApiClient
from fake_pipeline import BOS, CONTEXT, EOS, ByteTokenizer, FakePipeline

from core.errors import StepFailedError
from core.models.tokenizer import Tokenizer

URL = "/v1/completions"


def test_answer_has_openai_shape(client: ApiClient) -> None:
    body = client.post(URL, {"model": "demo", "prompt": "Hi"}).get_json()
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["model"] == "demo"
    assert isinstance(body["created"], int)
    assert body["choices"] == [
        {"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 5,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


def test_model_may_be_left_out_and_answers_to_its_aliases(client: ApiClient) -> None:
    assert client.post(URL, {"prompt": "Hi"}).get_json()["model"] == "demo"
    assert client.post(URL, {"prompt": "Hi", "model": "org/demo"}).get_json()["model"] == "org/demo"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[BOS, 97, 98]]),
        (["a", "b"], [[BOS, 97], [BOS, 98]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
    ],
)
def test_prompt_forms(client: ApiClient, pipeline: FakePipeline, prompt: Any, expected: list[list[int]]) -> None:
    body = client.post(URL, {"prompt": prompt, "n": 2}).get_json()
    assert [tokens for tokens, _ in pipeline.submitted] == expected
    assert [choice["index"] for choice in body["choices"]] == list(range(2 * len(expected)))


class BeginningTokenizer(ByteTokenizer):
    """Has a token in front of every text, the empty one too, as real ones with such a token do."""

    def encode(self, text: str, *, add_special_tokens: bool = True, context: int | None = None) -> list[int]:
        return ([BOS] if add_special_tokens else []) + list(text.encode())


def test_without_a_prompt_a_text_begins(client: ApiClient, pipeline: FakePipeline) -> None:
    """Null, which is not the same as missing: OpenAI's default is what stands between texts."""
    assert client.error(URL, {"prompt": None}, status=400)["param"] == "prompt", "its tokenizer has no such token"
    pipeline.fake_model = replace(pipeline.model, tokenizer=cast("Tokenizer", BeginningTokenizer()))
    assert client.post(URL, {"prompt": None}).status_code == 200
    assert pipeline.submitted[-1][0] == [BOS]
    assert client.error(URL, {}, status=400)["param"] == "prompt"


def test_special_tokens_may_be_left_out(client: ApiClient, pipeline: FakePipeline) -> None:
    client.post(URL, {"prompt": "a", "add_special_tokens": False})
    assert pipeline.submitted[0][0] == [97]


def test_sampling_parameters_reach_the_engine(client: ApiClient, pipeline: FakePipeline) -> None:
    asked = {
        "n": 2,
        "max_tokens": 7,
        "min_tokens": 1,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 4,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.1,
        "seed": 3,
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
    }
    others = {"logit_bias": {"65": -100}, "stop": "x", "stop_token_ids": [66], "priority": 3, "user": "someone"}
    assert client.post(URL, {"prompt": "a", **asked, **others}).status_code == 200
    params = pipeline.submitted[0][1]
    assert {name: getattr(params, name) for name in asked} == asked
    assert (dict(params.logit_bias), params.stop, params.stop_token_ids) == ({65: -100.0}, ("x",), (66,))
    assert pipeline.priorities == [3]


def test_defaults_are_openais_then_the_models(client: ApiClient, pipeline: FakePipeline) -> None:
    client.post(URL, {"prompt": "a", "temperature": None})
    assert (pipeline.submitted[-1][1].temperature, pipeline.submitted[-1][1].max_tokens) == (1.0, 16)
    pipeline.model.generation_defaults.update({"temperature": 0.6, "top_k": 20, "unrelated": 1})
    client.post(URL, {"prompt": "a", "top_k": -1})
    assert (pipeline.submitted[-1][1].temperature, pipeline.submitted[-1][1].top_k) == (0.6, 0)


def test_default_max_tokens_shrinks_to_the_context(client: ApiClient, pipeline: FakePipeline) -> None:
    assert client.post(URL, {"prompt": [97] * (CONTEXT - 3)}).status_code == 200
    assert pipeline.submitted[0][1].max_tokens == 3


def test_best_of_returns_the_likeliest(client: ApiClient, pipeline: FakePipeline) -> None:
    body = client.post(URL, {"prompt": "a", "n": 1, "best_of": 3}).get_json()
    assert len(body["choices"]) == 1
    assert body["choices"][0]["logprobs"] is None
    assert body["usage"]["completion_tokens"] == 15
    assert pipeline.submitted[0][1].logprobs == 0


def test_logprobs_shape(client: ApiClient) -> None:
    choice = client.post(URL, {"prompt": "a", "max_tokens": 2, "logprobs": 2}).get_json()["choices"][0]
    assert choice["logprobs"] == {
        "tokens": ["H", "e"],
        "token_logprobs": [-1.0, -1.0],
        "top_logprobs": [{"H": -1.0, "I": -2.0}, {"e": -1.0, "f": -2.0}],
        "text_offset": [0, 1],
    }
    assert choice["finish_reason"] == "length"


def test_improbable_tokens_stay_json(client: ApiClient) -> None:
    response = client.post(URL, {"prompt": "a", "max_tokens": 1, "logprobs": 3})
    assert response.get_json()["choices"][0]["logprobs"]["top_logprobs"][0]["</s>"] == -9999.0


def test_tokens_inside_a_character_have_its_offset(client: ApiClient, pipeline: FakePipeline) -> None:
    pipeline.reply = "a€b"
    choice = client.post(URL, {"prompt": "x", "logprobs": 1}).get_json()["choices"][0]
    assert choice["text"] == "a€b"
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 1, 2]
    assert choice["logprobs"]["tokens"][1] == "bytes:\\xe2"


def test_echo_repeats_the_prompt(client: ApiClient) -> None:
    choices = client.post(URL, {"prompt": ["ab", "c"], "echo": True, "n": 2}).get_json()["choices"]
    assert [choice["text"] for choice in choices] == ["abHello", "abHello", "cHello", "cHello"]
    choices = client.post(URL, {"prompt": [99], "echo": True}).get_json()["choices"]
    assert choices[0]["text"] == "cHello"


def test_echo_with_logprobs_covers_the_prompt(client: ApiClient) -> None:
    body = {"prompt": "ab", "echo": True, "logprobs": 1, "max_tokens": 1}
    logprobs = client.post(URL, body).get_json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["<s>", "a", "b", "H"]
    assert logprobs["token_logprobs"] == [None, -1.0, -1.0, -1.0]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["text_offset"] == [0, 0, 1, 2]


def test_echo_with_no_new_tokens_scores_the_prompt_alone(client: ApiClient) -> None:
    body = client.post(URL, {"prompt": "ab", "echo": True, "logprobs": 1, "max_tokens": 0}).get_json()
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "length")
    assert choice["logprobs"]["tokens"] == ["<s>", "a", "b"]
    assert body["usage"]["completion_tokens"] == 0


def test_stream_gives_text_then_one_finish_chunk_per_choice(client: ApiClient) -> None:
    *chunks, done = client.events(URL, {"prompt": ["a", "b"], "n": 2, "stream_options": {"include_usage": True}})
    assert done == "[DONE]"
    usage = chunks.pop()
    assert usage["choices"] == []
    assert usage["usage"]["prompt_tokens"] == 4
    assert usage["usage"]["completion_tokens"] == 20
    assert all(chunk["usage"] is None and chunk["object"] == "text_completion" for chunk in chunks)
    for index in range(4):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == "Hello"
        assert [choice["finish_reason"] for choice in mine] == [None] * 5 + ["stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_stream_without_usage_does_not_mention_it(client: ApiClient) -> None:
    chunks = client.events(URL, {"prompt": "a"})
    assert all("usage" not in chunk for chunk in chunks[:-1])


@pytest.mark.parametrize("max_tokens", [0, 5])
def test_stream_and_whole_answer_agree(client: ApiClient, pipeline: FakePipeline, max_tokens: int) -> None:
    pipeline.reply = "a€b"
    body = {"prompt": "xy", "echo": True, "logprobs": 2, "max_tokens": max_tokens}
    whole = client.post(URL, body).get_json()["choices"][0]
    chunks = [chunk["choices"][0] for chunk in client.events(URL, body)[:-1]]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    parts = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"] is not None]
    joined = {name: [entry for part in parts for entry in part[name]] for name in whole["logprobs"]}
    assert joined == whole["logprobs"]
    assert chunks[-1]["finish_reason"] == whole["finish_reason"]


def test_error_in_mid_stream_is_an_event_and_no_done(client: ApiClient, pipeline: FakePipeline) -> None:
    pipeline.failing[0] = StepFailedError("The forward pass failed.")
    events = client.events(URL, {"prompt": ["a", "b"]})
    assert events[-1] == {
        "error": {
            "message": "The forward pass failed.",
            "type": "server_error",
            "param": None,
            "code": "step_failed",
        }
    }


def test_failure_of_one_prompt_fails_the_answer_and_aborts_the_others(
    client: ApiClient, pipeline: FakePipeline
) -> None:
    pipeline.failing[1] = StepFailedError("The forward pass failed.")
    error = client.error(URL, {"prompt": ["a", "b"]}, status=500)
    assert error["code"] == "step_failed"


def test_batch_answers_prompt_by_prompt(client: ApiClient) -> None:
    body = client.post("/v1/batch/completions", {"prompts": ["a", "bc"], "n": 2}).get_json()
    assert body["object"] == "list"
    assert [item["index"] for item in body["data"]] == [0, 1]
    assert [choice["index"] for choice in body["data"][1]["choices"]] == [0, 1]
    assert body["data"][1]["object"] == "text_completion"
    assert [item["usage"]["prompt_tokens"] for item in body["data"]] == [2, 3]
    assert body["usage"]["prompt_tokens"] == 5
    assert body["usage"]["completion_tokens"] == 20


def test_batch_takes_one_list_of_token_ids_each(client: ApiClient, pipeline: FakePipeline) -> None:
    assert client.post("/v1/batch/completions", {"prompts": [[97], [98]]}).status_code == 200
    assert [tokens for tokens, _ in pipeline.submitted] == [[97], [98]]


def test_batch_keeps_a_failure_to_its_prompt(client: ApiClient, pipeline: FakePipeline) -> None:
    pipeline.failing[0] = StepFailedError("The forward pass failed.")
    data = client.post("/v1/batch/completions", {"prompts": ["a", "b"]}).get_json()["data"]
    assert data[0]["error"]["code"] == "step_failed"
    assert data[1]["choices"][0]["text"] == "Hello"
    pipeline.failing[1] = StepFailedError("The forward pass failed.")
    client.error("/v1/batch/completions", {"prompts": ["a", "b"]}, status=500)


def test_batch_does_not_stream(client: ApiClient) -> None:
    error = client.error("/v1/batch/completions", {"prompts": ["a"], "stream": True}, status=400)
    assert (error["code"], error["param"]) == ("unsupported_parameter", "stream")


def test_end_token_is_not_refused_as_input(client: ApiClient) -> None:
    assert client.post(URL, {"prompt": [EOS]}).status_code == 200
