"""Routes of llama.cpp's server: completions, what is served, what runs, tokens, and gaps that are filled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from api_client import ApiClient
from fake_pipeline import BOS, CONTEXT, EOS, GRAMMARS, ByteTokenizer, FakePipeline

from core.api.llamacpp import routes
from core.errors import StepFailedError
from core.views.status import RequestView

URL = "/completion"


def test_a_completion(client: ApiClient, pipeline: FakePipeline) -> None:
    answer = client.post(URL, {"prompt": "a", "n_predict": 4, "temperature": 0, "repeat_penalty": 1.5}).get_json()
    assert (answer["content"], answer["stop"], answer["stop_type"], answer["tokens"]) == ("Hell", True, "limit", [])
    assert (answer["tokens_predicted"], answer["tokens_evaluated"], answer["truncated"]) == (4, 2, False)
    assert answer["prompt"] == "<s>a"
    assert answer["timings"]["predicted_n"] == 4
    assert answer["timings"]["prompt_ms"] > 0
    settings = answer["generation_settings"]
    assert (settings["n_predict"], settings["temperature"], settings["repeat_penalty"]) == (4, 0.0, 1.5)
    assert pipeline.submitted[0][1].repetition_penalty == 1.5
    assert client.post(URL, {"prompt": "a", "return_tokens": True}).get_json()["tokens"] == list(b"Hello")


def test_a_stream_has_no_mark_at_its_end(client: ApiClient) -> None:
    *chunks, last = client.events(URL, {"prompt": "a"})
    assert "".join(chunk["content"] for chunk in chunks) == "Hello"
    assert [chunk["stop"] for chunk in chunks] == [False] * 5
    assert (last["stop"], last["stop_type"], last["content"], last["tokens_predicted"]) == (True, "eos", "", 5)


def test_a_stream_that_fails_says_so(client: ApiClient, pipeline: FakePipeline) -> None:
    pipeline.failing = {0: StepFailedError("The step failed.")}
    assert client.events(URL, {"prompt": "a"})[-1]["error"]["message"] == "The step failed."


@pytest.mark.parametrize(
    ("prompt", "token_ids"),
    [("a", [BOS, 97]), ([97, 98], [97, 98]), (["a", 98, "c"], [BOS, 97, 98, 99]), ([98, "c"], [98, 99])],
)
def test_prompts(client: ApiClient, pipeline: FakePipeline, prompt: Any, token_ids: list[int]) -> None:
    assert client.post(URL, {"prompt": prompt}).status_code == 200
    assert pipeline.submitted[0][0] == token_ids


@pytest.mark.parametrize(
    ("extra", "good", "bad"),
    [
        ({"grammar": 'root ::= "a" [0-9]+'}, b"a12", b"b"),
        ({"json_schema": {"type": "object"}, "grammar": ""}, b'{"a": 1}', b"[1]"),
        ({"json_schema": {}}, b"[1]", b"x"),
    ],
    ids=str,
)
def test_grammars_and_schemas_are_kept_to(
    client: ApiClient, pipeline: FakePipeline, extra: dict[str, Any], good: bytes, bad: bytes
) -> None:
    assert client.post(URL, {"prompt": "a", **extra}).status_code == 200
    matcher = GRAMMARS.matcher(pipeline.submitted[-1][1].grammar)
    assert matcher.validate_tokens(list(good)) == len(good)
    assert matcher.validate_tokens(list(bad)) < len(bad)


def test_no_grammar_is_none(client: ApiClient, pipeline: FakePipeline) -> None:
    assert client.post(URL, {"prompt": "a", "grammar": ""}).status_code == 200
    assert pipeline.submitted[-1][1].grammar is None


@pytest.mark.parametrize(("given", "limit"), [(None, CONTEXT - 2), (-1, CONTEXT - 2), (9999, CONTEXT - 2), (7, 7)])
def test_the_limit_is_what_fits_at_most(
    client: ApiClient, pipeline: FakePipeline, given: int | None, limit: int
) -> None:
    client.post(URL, {"prompt": "a", "n_predict": given})
    assert pipeline.submitted[0][1].max_tokens == limit


def test_biases_are_pairs_or_an_object(client: ApiClient, pipeline: FakePipeline) -> None:
    for given in ([[97, 1.5], [98, False]], {"97": 1.5, "98": -100}):
        assert client.post(URL, {"prompt": "a", "logit_bias": given}).status_code == 200
        assert pipeline.submitted[-1][1].logit_bias == {97: 1.5, 98: -100.0}


def test_biases_of_texts_are_those_of_their_tokens(client: ApiClient, pipeline: FakePipeline) -> None:
    for given in ([["ab", -3], ["c", False]], {"ab": -3, "c": False}):
        assert client.post(URL, {"prompt": "a", "logit_bias": given}).status_code == 200
        assert pipeline.submitted[-1][1].logit_bias == {97: -3.0, 98: -3.0, 99: -100.0}


def test_several_prompts_have_a_list_of_answers(client: ApiClient, pipeline: FakePipeline) -> None:
    prompts = ["a", [98, 99], [100, "e"], {"prompt_string": "f"}]
    answers = client.post(URL, {"prompt": prompts}).get_json()
    assert [prompt for prompt, _ in pipeline.submitted] == [[256, 97], [98, 99], [100, 101], [256, 102]]
    assert [(answer["index"], answer["prompt"]) for answer in answers] == [
        (0, "<s>a"),
        (1, "bc"),
        (2, "de"),
        (3, "<s>f"),
    ]
    assert {answer["content"] for answer in answers} == {"Hello"}
    (alone,) = client.post(URL, {"prompt": ["a"]}).get_json()
    assert alone["content"] == "Hello"
    assert client.post(URL, {"prompt": {"prompt_string": "a"}}).get_json()["content"] == "Hello"


def test_the_events_of_several_prompts_say_whose_they_are(client: ApiClient) -> None:
    texts, ends = {0: "", 1: ""}, []
    for event in client.events(URL, {"prompt": ["a", "b"]}):
        texts[event["index"]] += event["content"]
        ends += [(event["index"], event["tokens_predicted"])] if event["stop"] else []
    assert texts == {0: "Hello", 1: "Hello"}
    assert ends == [(0, 5), (1, 5)]


def test_the_cache_may_be_left_alone(client: ApiClient, pipeline: FakePipeline) -> None:
    for path, body in (
        (URL, {"prompt": "a"}),
        ("/v1/completions", {"prompt": "a"}),
        ("/api/generate", {"prompt": "a"}),
    ):
        assert client.post(path, {**body, "cache_prompt": False}).status_code == 200
        assert not pipeline.submitted[-1][1].cache_prompt
        assert client.post(path, body).status_code == 200
        assert pipeline.submitted[-1][1].cache_prompt


def test_probabilities(client: ApiClient) -> None:
    answer = client.post(URL, {"prompt": "a", "n_probs": 2}).get_json()
    first = answer["completion_probabilities"][0]
    assert (first["id"], first["token"], first["bytes"], len(first["top_logprobs"])) == (72, "H", [72], 2)
    *chunks, _ = client.events(URL, {"prompt": "a", "n_probs": 2})
    assert [entry for chunk in chunks for entry in chunk["completion_probabilities"]] == (
        answer["completion_probabilities"]
    )
    assert "completion_probabilities" not in client.post(URL, {"prompt": "a"}).get_json()


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [["a"], {}]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": ["a"] * 1000}, "prompt"),
        ({"prompt": {"prompt_string": "a", "multimodal_data": ["x"]}}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"grammar": "root ::= x"}, "grammar"),
        ({"grammar": 'root ::= "a"', "json_schema": {}}, "json_schema"),
        ({"grammar": 'root ::= "a"', "grammar_lazy": True}, "grammar_lazy"),
        ({"json_schema": {"not": {}}}, "json_schema"),
        ({"mirostat": 2}, "mirostat"),
        ({"samplers": ["top_k"]}, "samplers"),
        ({"n_predict": 0}, "n_predict"),
        ({"n_probs": 21}, "n_probs"),
        ({"repeat_penalty": 0}, "repeat_penalty"),
        ({"logit_bias": [97]}, "logit_bias"),
        ({"n": 2}, "n"),
        ({"cache_prompt": 3}, "cache_prompt"),
        ({"logit_bias": [["a"]]}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": 3}, "logit_bias"),
    ],
)
def test_what_is_wrong_is_named(client: ApiClient, pipeline: FakePipeline, extra: dict[str, Any], param: str) -> None:
    assert client.error(URL, {"prompt": "a", **extra}, status=400)["param"] == param
    assert not pipeline.submitted


def test_what_is_served(client: ApiClient, pipeline: FakePipeline) -> None:
    props = client.get("/props").get_json()
    assert (props["total_slots"], props["default_generation_settings"]["n_ctx"]) == (64, CONTEXT)
    assert (props["model_alias"], props["chat_template"], props["eos_token"]) == ("demo", "{{ messages }}", "</s>")
    pipeline.fake_model = None
    assert client.get("/props").status_code == 503


def test_what_runs(client: ApiClient, monkeypatch: pytest.MonkeyPatch) -> None:
    views = [RequestView("a", "running", 7, 3, 0.5), RequestView("b", "waiting", 5, 0, 0.1)]
    monkeypatch.setattr(routes, "queue_view", lambda *given: SimpleNamespace(requests=views))
    first, second = client.get("/slots").get_json()
    assert (first["id_task"], first["is_processing"], first["next_token"]) == ("a", True, [{"n_decoded": 3}])
    assert (second["is_processing"], second["n_prompt_tokens"]) == (False, 5)
    monkeypatch.undo()
    assert client.get("/slots").get_json() == []


def test_the_template_makes_a_prompt(client: ApiClient) -> None:
    body = {"messages": [{"role": "user", "content": "x"}]}
    assert client.post("/apply-template", body).get_json() == {"prompt": "<s>u:x\na:"}
    assert client.error("/apply-template", {"messages": []}, status=400)["param"] == "messages"


def test_tokens_as_llama_cpp_has_them(client: ApiClient) -> None:
    assert client.post("/tokenize", {"content": "aé"}).get_json() == {"tokens": [97, 195, 169]}
    body = {"content": "aé", "add_special": True, "with_pieces": True}
    assert client.post("/tokenize", body).get_json()["tokens"] == [
        {"id": BOS, "piece": "<s>"}, {"id": 97, "piece": "a"}, {"id": 195, "piece": [195]}, {"id": 169, "piece": [169]},
    ]  # fmt: skip
    assert client.post("/tokenize", {"content": ""}).get_json() == {"tokens": []}
    assert client.post("/detokenize", {"tokens": [97, 98]}).get_json()["content"] == "ab"
    assert client.error("/tokenize", {"content": "a", "prompt": "b"}, status=400)["param"] == "content"


class GapTokenizer(ByteTokenizer):
    """Has tokens for gaps, in place of control characters."""

    added_tokens = frozenset({"<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"})

    def encode(self, text: str, *, add_special_tokens: bool = True, context: int | None = None) -> list[int]:
        names = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
        if text in names:
            return [names.index(text) + 1]
        return super().encode(text, add_special_tokens=add_special_tokens, context=context)


def test_a_gap_is_filled_by_models_that_can(client: ApiClient, pipeline: FakePipeline) -> None:
    body = {"input_prefix": "ab", "input_suffix": "yz", "prompt": "c", "n_predict": 3}
    error = client.error("/infill", body, status=400)
    assert (error["code"], "no tokens for filling a gap" in error["message"]) == ("unsupported_model", True)
    pipeline.fake_model = replace(pipeline.model, tokenizer=cast(Any, GapTokenizer()))
    assert client.post("/infill", body).get_json()["content"] == "Hel"
    assert shown(pipeline.submitted[0][0]) == [BOS, 1, "a", "b", 2, "y", "z", 3, "c"]
    client.post("/infill", body | {"input_extra": [{"filename": "f", "text": "0"}], "prompt": ""})
    assert shown(pipeline.submitted[1][0]) == [BOS, 1, "0", "a", "b", 2, "y", "z", 3]
    assert client.error("/infill", {"input_prefix": "a"}, status=400)["param"] == "input_suffix"
    assert client.error("/infill", body | {"input_prefix": "a" * CONTEXT}, status=400)


def shown(token_ids: Sequence[int]) -> list[int | str]:
    return [token_id if token_id < 32 or token_id in (BOS, EOS) else chr(token_id) for token_id in token_ids]
