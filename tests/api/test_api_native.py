"""VRAMancer's own routes: generate, infer, tokenize, models, cancel."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from api_client import ApiClient, openai_error
from fake_pipeline import BOS, CONTEXT, HIDDEN, VOCAB, FakePipeline, fake_model
from safetensors.torch import load
from steering import LONGEST_WAIT_S, until

from core.api import native
from core.api.ollama import answers as ollama_answers
from core.request import RequestOutput, SequenceDelta


def test_generate_answer(client: ApiClient) -> None:
    body = client.post("/api/generate", {"prompt": "a", "logprobs": 1, "prompt_logprobs": 0, "n": 2}).get_json()
    assert body["id"].startswith("gen-")
    first, second = body["outputs"]
    assert (first["index"], second["index"]) == (0, 1)
    assert first["text"] == "Hello"
    assert first["token_ids"] == list(b"Hello")
    assert first["finish_reason"] == "stop"
    entry = {"token_id": 72, "token": "H", "logprob": -1.0}
    assert first["logprobs"][0] == {**entry, "top": [entry]}
    assert body["prompt_logprobs"] == [None, {"token_id": 97, "token": "a", "logprob": -1.0, "top": []}]
    assert body["usage"]["completion_tokens"] == 10
    timings = body["timings"]
    assert 0 < timings["time_to_first_token_s"] <= timings["total_s"]


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"prompt": "ab"}, [BOS, 97, 98]),
        ({"prompt": "ab", "add_special_tokens": False}, [97, 98]),
        ({"prompt_token_ids": [1, 2]}, [1, 2]),
        ({"messages": [{"role": "user", "content": "x"}]}, [BOS, *b"u:x\na:"]),
    ],
)
def test_generate_input_forms(client: ApiClient, pipeline: FakePipeline, body: Any, tokens: list[int]) -> None:
    assert client.post("/api/generate", {**body, "detokenize": True}).status_code == 200
    assert pipeline.submitted[0][0] == tokens
    assert pipeline.submitted[0][1].max_tokens is None


@pytest.mark.parametrize("body", [{"prompt": "a", "prompt_token_ids": [1]}, {"prompt": ""}, {"prompt_token_ids": []}])
def test_generate_wants_one_prompt(client: ApiClient, body: Any) -> None:
    client.error("/api/generate", body, status=400)


def test_generate_stream(client: ApiClient) -> None:
    *chunks, last, done = client.events("/api/generate", {"prompt": "a", "logprobs": 0}, Accept="text/event-stream")
    assert done == "[DONE]"
    assert "".join(chunk["text"] for chunk in chunks) == "Hello"
    assert [token for chunk in chunks for token in chunk["token_ids"]] == list(b"Hello")
    assert chunks[-1]["finish_reason"] == "stop"
    assert last["done"] is True
    assert last["usage"]["completion_tokens"] == 5
    assert last["timings"]["total_s"] > 0


@pytest.mark.parametrize(
    ("arrivals", "first_s", "decode_tok_s"),
    [
        ([], None, None),
        ([(2, 1)], 2.0, None),
        ([(2, 1), (3, 1), (5, 1)], 2.0, 2 / 4),
        ([(2, 0), (3, 2), (4, 3)], 3.0, 4 / 3),
        ([(6, 3)], 6.0, None),
    ],
    ids=["no token", "one token", "one by one", "several at once, none at first", "all at the end"],
)
def test_the_rate_is_that_of_the_tokens_after_the_first(
    monkeypatch: pytest.MonkeyPatch,
    arrivals: list[tuple[int, int]],
    first_s: float | None,
    decode_tok_s: float | None,
) -> None:
    """Seconds after the start at which so many tokens come; the answer is complete after 6."""
    clock = SimpleNamespace(now_s=100.0)
    for module in (native, ollama_answers):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now_s))
    writer = native.GenerateWriter(native.GenerateRequest.model_validate({"prompt": "a"}), fake_model(), "gen-1")
    for seconds, count in arrivals:
        clock.now_s = 100.0 + seconds
        list(writer.chunks(0, RequestOutput("r", (SequenceDelta(0, token_ids=(97,) * count),), 1)))
    clock.now_s = 106.0
    expected = {"total_s": 6.0, "time_to_first_token_s": first_s, "decode_tok_s": decode_tok_s}
    assert writer.totals()["timings"] == expected


def test_infer_json(client: ApiClient) -> None:
    body = client.post("/api/infer", {"token_ids": [1, 2, 3], "positions": "all"}).get_json()
    assert body["shape"] == [3, VOCAB]
    assert body["data"][0][0] is None
    assert body["data"][2] == [0.0] * VOCAB
    body = client.post("/api/infer", {"token_ids": [1, 2, 3], "output": "hidden_states"}).get_json()
    assert (body["output"], body["shape"]) == ("hidden_states", [1, HIDDEN])


@pytest.mark.parametrize("accept", ["application/x-safetensors", "application/octet-stream"])
def test_infer_safetensors(client: ApiClient, accept: str) -> None:
    response = client.post("/api/infer", {"token_ids": [1, 2], "positions": "all"}, headers={"Accept": accept})
    assert response.mimetype == accept
    tensors = load(response.data)
    assert tensors["logits"].shape == (2, VOCAB)
    assert tensors["logits"][0, 0] == float("-inf")


def test_infer_bounds(client: ApiClient, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ({"token_ids": []}, {"token_ids": "a"}, {"token_ids": [1], "output": "x"}, {"token_ids": [1.5]}):
        client.error("/api/infer", wrong, status=400)
    error = client.error("/api/infer", {"token_ids": [1] * (CONTEXT + 1)}, status=400)
    assert error["code"] == "context_length_exceeded"
    monkeypatch.setattr(native, "MAX_JSON_VALUES", HIDDEN * 2)
    client.error("/api/infer", {"token_ids": [1]}, status=400)
    body = {"token_ids": [1] * 3, "output": "hidden_states", "positions": "all"}
    assert client.error("/api/infer", body, status=400)["param"] == "positions"


@pytest.mark.parametrize(
    ("accept", "most"), [("application/json", 1_000_000), ("application/x-safetensors", 512 * 2**20 // 4)]
)
def test_infer_answers_up_to_a_million_values_as_json_and_512_mib_as_a_file(
    client: ApiClient, pipeline: FakePipeline, accept: str, most: int
) -> None:
    """Counted in rows as wide as the vocabulary: one for the last position, however many tokens are sent."""

    def ask(vocab_size: int, positions: str) -> Any:
        pipeline.fake_model = replace(fake_model(), vocab_size=vocab_size)
        body = {"token_ids": [1, 2], "positions": positions}
        return client.post("/api/infer", body, headers={"Accept": accept})

    assert ask(most, "last").status_code == 200
    assert ask(most // 2, "all").status_code == 200
    for refused in (ask(most + 1, "last"), ask(most // 2 + 1, "all")):
        assert refused.status_code == 400
        error = openai_error(refused)
        assert error["param"] == "positions"
        assert f"more than the {most} " in error["message"]


def test_infer_offers_no_other_format(client: ApiClient) -> None:
    client.error("/api/infer", {"token_ids": [1]}, status=406, headers={"Accept": "image/png"})


def test_tokenize_and_detokenize(client: ApiClient) -> None:
    body = client.post("/tokenize", {"prompt": "ab", "return_token_strs": True}).get_json()
    assert body == {"tokens": [BOS, 97, 98], "count": 3, "max_model_len": CONTEXT, "token_strs": ["<s>", "a", "b"]}
    body = client.post("/tokenize", {"prompt": "ab", "add_special_tokens": False}).get_json()
    assert (body["tokens"], body["token_strs"]) == ([97, 98], None)
    body = client.post("/tokenize", {"messages": [{"role": "user", "content": "x"}]}).get_json()
    assert bytes(body["tokens"][1:]) == b"u:x\na:"
    assert client.post("/detokenize", {"tokens": [BOS, 97]}).get_json() == {"prompt": "<s>a", "content": "<s>a"}
    client.error("/tokenize", {}, status=400)
    client.error("/tokenize", {"prompt": "a", "messages": []}, status=400)
    client.error("/detokenize", {}, status=400)


def test_openai_models(client: ApiClient, pipeline: FakePipeline) -> None:
    body = client.get("/v1/models").get_json()
    assert [card["id"] for card in body["data"]] == ["demo", "org/demo"]
    card = client.get("/v1/models/org/demo").get_json()
    assert (card["object"], card["owned_by"], card["root"]) == ("model", "vramancer", "demo")
    response = client.get("/v1/models/other")
    assert response.status_code == 404
    assert openai_error(response)["code"] == "model_not_found"
    pipeline.fake_model = None
    assert client.get("/v1/models").get_json() == {"object": "list", "data": []}
    assert client.get("/v1/models/demo").status_code == 404


def test_load_list_unload(client: ApiClient, pipeline: FakePipeline) -> None:
    options = {
        "num_gpus": 2, "dtype": "float32", "devices": "cpu=1GiB", "max_model_len": 99, "quantize": "int4",
        "quantize_group": 32, "tool_parser": "hermes", "reasoning_parser": "none",
    }  # fmt: skip
    assert client.post("/api/models/load", {"model": "other", **options}).get_json()["id"] == "other"
    assert pipeline.loads == [("other", options)]
    body = client.get("/api/models").get_json()
    assert body["loaded"] == "other"
    assert (body["data"][0]["id"], body["data"][0]["loaded"]) == ("other", True)
    assert not any(entry["loaded"] for entry in body["data"][1:])
    assert client.post("/api/models/unload").get_json() == {"unloaded": "other"}
    assert client.post("/api/models/unload").status_code == 503
    assert client.get("/api/models").get_json()["loaded"] is None


def test_place_answers_the_plan_and_what_is_predicted_of_it(client: ApiClient, pipeline: FakePipeline) -> None:
    asked = {"devices": "cpu=1GiB,cpu=2GiB", "placement": "vram", "layers": "2,2", "objective": "latency"}
    response = client.post("/api/pipeline/place", {**asked, "dry_run": True})
    assert response.status_code == 200
    assert response.get_json() == {
        "stages": [{"device": "cpu#0", "layers": [0, 1]}, {"device": "cpu#1", "layers": [2, 3]}],
        "prediction": {"1": 12.5},
        "dry_run": True,
    }
    assert client.post("/api/pipeline/place", {}).get_json()["dry_run"] is False
    left_out = dict.fromkeys(asked)
    assert pipeline.placements == [{**asked, "dry_run": True}, {**left_out, "dry_run": False}]


@pytest.mark.parametrize(
    "wrong",
    [
        {"devices": ""}, {"devices": 3}, {"devices": "toaster:0"}, {"devices": "cpu=1GiB," * 1000},
        {"placement": ""}, {"placement": "x" * 65}, {"placement": "unheard-of"}, {"layers": [2, 2]}, {"layers": "2,x"},
        {"objective": "beauty"}, {"dry_run": "yes"}, {"dry_run": None}, {"more": 1},
    ],
)  # fmt: skip
def test_place_checks_its_parameters(client: ApiClient, pipeline: FakePipeline, wrong: Any) -> None:
    assert client.error("/api/pipeline/place", wrong, status=400)["param"] == next(iter(wrong))
    assert not pipeline.placements


def test_place_needs_a_model_and_no_load_under_way(client: ApiClient, pipeline: FakePipeline) -> None:
    pipeline.load_under_way = True
    assert client.error("/api/pipeline/place", {}, status=409)["code"] == "conflict"
    pipeline.fake_model = None
    assert client.error("/api/pipeline/place", {}, status=503)["code"] == "model_not_loaded"
    assert not pipeline.placements


@pytest.mark.parametrize("extra", [
    {"num_gpus": 0}, {"dtype": "int3"}, {"devices": 3}, {"max_model_len": 0}, {"quantize": "int3"},
    {"quantize": 4}, {"quantize_group": 48}, {"quantize_group": "64"},
])  # fmt: skip
def test_load_checks_its_parameters(client: ApiClient, pipeline: FakePipeline, extra: Any) -> None:
    assert client.error("/api/models/load", {"model": "m", **extra}, status=400)["param"] == next(iter(extra))
    client.error("/api/models/load", {}, status=400)
    assert not pipeline.loads


@pytest.mark.parametrize("by", ["request id", "answer id"])
def test_cancel_ends_a_running_request(client: ApiClient, pipeline: FakePipeline, by: str) -> None:
    pipeline.hold = True
    answers: list[Any] = []
    thread = threading.Thread(
        target=lambda: answers.append(client.post("/v1/completions", {"prompt": "a"}, headers={"X-Request-ID": "mine"}))
    )
    thread.start()
    until(lambda: pipeline.running, "the request has arrived")
    name = "mine" if by == "request id" else next(iter(pipeline.running)).rpartition("-")[0]
    response = (
        client.delete(f"/api/requests/{name}") if by == "answer id" else client.post(f"/api/requests/{name}/cancel")
    )
    assert response.status_code == 200
    thread.join(LONGEST_WAIT_S)
    assert answers[0].get_json()["choices"][0]["finish_reason"] == "abort"
    assert client.post(f"/api/requests/{name}/cancel").status_code == 404
