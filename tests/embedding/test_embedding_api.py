"""The routes around the vectors: shapes, usage, errors, limits, and which model answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from api.api_client import ApiClient
from embedding.conftest import pipeline_of
from embedding.encoders import HIDDEN, Gate, save_encoder, save_reranker, text, write
from safetensors.torch import load_file, save_file
from steering import LONGEST_WAIT_S, until

from core.errors import CheckpointError, ConfigError, UnsupportedModelError
from core.security.admission import DISCONNECTED_KEY

Serve = Callable[..., ApiClient]


@pytest.fixture
def client(serve: Serve, tmp_path: Path) -> ApiClient:
    save_encoder(tmp_path / "encoder")
    save_reranker(tmp_path / "reranker")
    return serve(model=tmp_path / "encoder", reranker=tmp_path / "reranker")


def test_an_answer_has_openai_s_shape(client: ApiClient) -> None:
    for path in ("/v1/embeddings", "/embeddings"):
        body = client.post(path, {"model": "encoder", "input": [text(5, 6), text(7)]}).get_json()
        assert set(body) == {"object", "data", "model", "usage"}
        assert (body["object"], body["model"]) == ("list", "encoder")
        assert body["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
        assert [set(each) for each in body["data"]] == [{"object", "index", "embedding"}] * 2
        assert [len(each["embedding"]) for each in body["data"]] == [HIDDEN] * 2


def test_ollama_s_clients_get_the_same_vectors(client: ApiClient) -> None:
    texts = [text(5, 6), text(7)]
    ours = client.post("/v1/embeddings", {"model": "encoder", "input": texts, "dimensions": 8}).get_json()
    body = client.post("/api/embed", {"model": "encoder:latest", "input": texts, "dimensions": 8}).get_json()
    for mine, theirs in zip(ours["data"], body["embeddings"], strict=True):
        assert theirs == pytest.approx(mine["embedding"], abs=1e-6)
    assert (body["model"], body["prompt_eval_count"], body["load_duration"]) == ("encoder:latest", 7, 0)
    one = client.post("/api/embed", {"model": "encoder", "input": texts[0]}).get_json()["embeddings"]
    assert len(one) == 1 and abs(sum(value * value for value in one[0]) - 1.0) < 1e-5
    assert client.post("/api/embed", {"model": "encoder", "input": []}).get_json()["embeddings"] == []


def test_ollama_s_texts_that_are_too_long_are_cut_unless_that_is_not_wanted(client: ApiClient) -> None:
    long = text(*range(5, 70))
    assert client.post("/api/embed", {"model": "encoder", "input": long}).get_json()["prompt_eval_count"] == 48
    refused = client.post("/api/embed", {"model": "encoder", "input": long, "truncate": False})
    assert refused.status_code == 400 and isinstance(refused.get_json()["error"], str)


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({}, "input", "required"),
        ({"input": ""}, "input", "must not be empty"),
        ({"input": []}, "input", "must not be empty"),
        ({"input": [[]]}, "input", "number 0"),
        ({"input": ["w5", ""]}, "input", "number 1"),
        ({"input": ["w5", 7]}, "input", "number 1"),
        ({"input": [5, "w5"]}, "input", "number 0"),
        ({"input": [[5], [True]]}, "input", "number 1"),
        ({"input": {"text": "w5"}}, "input", "a text, token ids"),
        ({"input": ["w5"] * 2049}, "input", "2048"),
        ({"input": [96]}, "input", "between 0 and 95"),
        ({"input": [-1]}, "input", "between 0 and 95"),
        ({"input": "w5", "dimensions": 33}, "dimensions", "32 dimensions"),
        ({"input": "w5", "dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ({"input": "w5", "encoding_format": "hex"}, "encoding_format", "float"),
        ({"input": "w5", "prompt_name": "query"}, "prompt_name", "no such prompt"),
        ({"input": "w5", "truncate_prompt_tokens": 49}, "truncate_prompt_tokens", "between 1 and 48"),
        ({"input": "w5", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "between 1 and 48"),
        ({"input": "w5", "messages": []}, "messages", "not supported"),
        ({"input": "w5", "model": "reranker"}, "model", "reranker"),
    ],
)
def test_what_is_wrong_is_said(client: ApiClient, body: dict[str, Any], param: str, said: str) -> None:
    error = client.error("/v1/embeddings", body, status=400)
    assert error["param"].partition("[")[0] == param
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"


def test_texts_that_are_too_long_are_refused(client: ApiClient) -> None:
    for given in (text(*range(5, 55)), list(range(5, 55))):
        error = client.error("/v1/embeddings", {"input": given}, status=400)
        assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
        assert "48 tokens" in error["message"]


def test_an_unknown_model_is_404(client: ApiClient) -> None:
    for path, body in (("/v1/embeddings", {"input": "w5"}), ("/v1/rerank", {"query": "w5", "documents": ["w6"]})):
        assert client.error(path, body | {"model": "text-embedding-3-small"}, status=404)["code"] == "model_not_found"


def test_a_full_queue_is_429_with_a_time(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_encoder(tmp_path / "encoder")
    client = serve(model=tmp_path / "encoder", max_queue=2)
    engine = pipeline_of(client).encoders.embedding
    assert engine is not None
    assert client.error("/v1/embeddings", {"input": ["w5"] * 3}, status=400)["param"] == "input"
    monkeypatch.setattr(engine.stats, "held_inputs", 2)
    response = client.post("/v1/embeddings", {"input": "w5"})
    assert response.status_code == 429
    assert int(response.headers["Retry-After"]) >= 1
    assert response.get_json()["error"]["code"] == "queue_full"
    monkeypatch.undo()
    assert client.post("/v1/embeddings", {"input": "w5"}).status_code == 200


def test_models_health_and_metrics_know_them(client: ApiClient) -> None:
    client.post("/v1/embeddings", {"input": ["w5", "w6 w7"]})
    assert [card["id"] for card in client.get("/v1/models").get_json()["data"]] == ["chat", "encoder", "reranker"]
    assert client.get("/v1/models/encoder").get_json()["max_model_len"] == 48
    checks = client.get("/health").get_json()["checks"]
    assert checks["embedding"]["status"] == checks["reranker"]["status"] == "ok"
    metrics = client.get("/metrics").get_data(as_text=True)
    assert 'vramancer_embedding_inputs_total{kind="embedding",model="encoder"} 2.0' in metrics
    assert 'vramancer_embedding_tokens_total{kind="embedding",model="encoder"} 7.0' in metrics
    assert 'vramancer_embedding_inputs_total{kind="reranker",model="reranker"} 0.0' in metrics


def test_a_thread_that_has_ended_is_told_by_health(client: ApiClient, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = pipeline_of(client).encoders.embedding
    assert engine is not None
    monkeypatch.setattr(engine, "_next_batch", lambda: 1 / 0)
    client.post("/v1/embeddings", {"input": "w5"})  # after this batch the thread asks for the next one
    error = client.error("/v1/embeddings", {"input": "w5"}, status=503)
    assert error["code"] == "engine_dead"
    response = client.get("/health")
    assert response.status_code == 503
    assert response.get_json()["failed"] == ["embedding"]


def test_memory_is_in_the_ledger_of_main_memory(client: ApiClient) -> None:
    pipeline = pipeline_of(client)
    held = pipeline.main_memory.budget.used_by_purpose()
    assert held["embedding weights"] > 200_000  # of both models
    pipeline.encoders.close()
    assert not {"embedding weights", "embedding workspace"} & set(pipeline.main_memory.budget.used_by_purpose())


@pytest.fixture
def held(client: ApiClient, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """The encoder computes nothing until it is let."""
    engine = pipeline_of(client).encoders.embedding
    assert engine is not None
    gate = Gate(engine._encoder)
    monkeypatch.setattr(engine, "_encoder", gate)
    yield gate
    gate.open.set()


def test_an_answer_can_be_cancelled_by_its_request_id(client: ApiClient, held: Gate) -> None:
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.post, "/v1/embeddings", {"input": "w5"}, headers={"X-Request-ID": "mine"})
        assert held.begun.wait(LONGEST_WAIT_S)
        live = client.raw.application.extensions["vramancer"].live
        until(lambda: len(live) == 1, "the request is known")
        assert client.post("/api/requests/mine/cancel", {}).status_code == 200
        response = asked.result(LONGEST_WAIT_S)
    assert response.status_code == 409
    assert response.get_json()["error"]["code"] == "conflict"
    assert client.error("/api/requests/mine/cancel", {}, status=404)["code"] == "not_found"


def test_a_client_that_leaves_takes_its_texts_along(client: ApiClient, held: Gate) -> None:
    engine = pipeline_of(client).encoders.embedding
    assert engine is not None
    gone = {DISCONNECTED_KEY: lambda: True}
    assert client.post("/v1/embeddings", {"input": ["w5", "w6"]}, environ_overrides=gone).status_code == 499
    assert engine.stats.held_inputs == 0
    engine.check_invariants()


# -- rerank and score --------------------------------------------------------------------------------------------------


def test_rerank_has_the_shape_of_jina_and_cohere(client: ApiClient) -> None:
    body = {"model": "reranker", "query": text(5, 6), "documents": [text(7), {"text": text(8, 9)}, text(10)]}
    for path in ("/v1/rerank", "/rerank", "/v2/rerank", "/v1/reranking"):
        answer = client.post(path, body).get_json()
        assert answer["model"] == "reranker"
        assert answer["usage"] == {"prompt_tokens": 19, "total_tokens": 19}
        assert sorted(each["index"] for each in answer["results"]) == [0, 1, 2]
        scores = [each["relevance_score"] for each in answer["results"]]
        assert scores == sorted(scores, reverse=True)
        texts = [text(7), text(8, 9), text(10)]
        assert all(each["document"] == {"text": texts[each["index"]]} for each in answer["results"])
    short = client.post("/v1/rerank", body | {"top_n": 1, "return_documents": False}).get_json()["results"]
    assert short == [{key: answer["results"][0][key] for key in ("index", "relevance_score")}]


def test_score_has_the_shape_of_vllm(client: ApiClient) -> None:
    answer = client.post("/v1/score", {"text_1": [text(5), text(6)], "text_2": [text(7), text(8)]}).get_json()
    assert answer["object"] == "list"
    assert [(each["index"], each["object"]) for each in answer["data"]] == [(0, "score"), (1, "score")]
    crossed = client.post("/v1/score", {"text_1": text(6), "text_2": text(8)}).get_json()
    assert crossed["data"][0]["score"] == pytest.approx(answer["data"][1]["score"], abs=1e-6)
    assert answer["usage"] == {"prompt_tokens": 10, "total_tokens": 10, "completion_tokens": 0}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/rerank", {"documents": ["w5"]}, "query"),
        ("/v1/rerank", {"query": "", "documents": ["w5"]}, "query"),
        ("/v1/rerank", {"query": "w5", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "w5", "documents": ["w5", {"title": "w6"}]}, "documents"),
        ("/v1/rerank", {"query": "w5", "documents": ["w5"], "top_n": -1}, "top_n"),
        ("/v1/rerank", {"query": "w5", "documents": ["w5"], "max_tokens_per_doc": 5}, "max_tokens_per_doc"),
        ("/v1/rerank", {"query": text(*range(5, 75)), "documents": ["w5"]}, "documents"),
        (
            "/v1/rerank",
            {"query": text(*range(5, 75)), "documents": ["w5"], "truncate_prompt_tokens": -1},
            "documents",
        ),
        ("/v1/score", {"text_1": ["w5", "w6"], "text_2": ["w5", "w6", "w7"]}, "text_1"),
        ("/v1/score", {"text_1": "w5"}, "text_2"),
    ],
)
def test_what_is_wrong_with_pairs_is_said(client: ApiClient, path: str, body: dict[str, Any], param: str) -> None:
    assert client.error(path, body, status=400)["param"] == param


# -- loading -----------------------------------------------------------------------------------------------------------


def test_a_reranker_is_no_embedding_model(serve: Serve, tmp_path: Path) -> None:
    save_reranker(tmp_path / "reranker")
    with pytest.raises(ConfigError, match=r"embeddings.model: reranker is a reranker, not an embedding model"):
        serve(model=tmp_path / "reranker")


def test_a_classifier_of_several_labels_is_refused(serve: Serve, tmp_path: Path) -> None:
    save_reranker(tmp_path / "classes", num_labels=3)
    with pytest.raises(UnsupportedModelError, match="3 classes"):
        serve(reranker=tmp_path / "classes")


def test_files_that_lack_a_tensor_are_refused(serve: Serve, tmp_path: Path) -> None:
    save_encoder(tmp_path / "encoder")
    file = tmp_path / "encoder" / "model.safetensors"
    tensors = load_file(file)
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks encoder.layer.1.output.dense.weight"):
        serve(model=tmp_path / "encoder")


def test_weights_that_are_not_finite_are_refused(serve: Serve, tmp_path: Path) -> None:
    save_encoder(tmp_path / "encoder")
    file = tmp_path / "encoder" / "model.safetensors"
    tensors = load_file(file)
    tensors["encoder.layer.1.output.dense.bias"].fill_(torch.nan)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="not finite"):
        serve(model=tmp_path / "encoder")


def test_a_model_of_unknown_modules_is_refused_before_anything_is_loaded(serve: Serve, tmp_path: Path) -> None:
    save_encoder(tmp_path / "encoder")
    write(tmp_path / "encoder", modules=[{"type": "sentence_transformers.models.Dense", "path": ""}])
    with pytest.raises(UnsupportedModelError, match="Dense"):
        serve(model=tmp_path / "encoder")
