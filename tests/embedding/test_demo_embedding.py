"""The bundled embedding model: served beside the demo model, small, and about as good as counting words, or better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from api.api_client import TOKEN, ApiClient
from demo_corpus import retrieval
from train_demo_embedding import CONTEXT, FILL, WIDTH, as_bert, bag_of_words, recall

from core.api import create_app
from core.defaults import DEMO_EMBEDDING_NAME, DEMO_NAME
from core.inference_pipeline import InferencePipeline
from core.models.resolve import DEMO_EMBEDDING_PATH

OpenPipeline = Callable[..., InferencePipeline]


@pytest.fixture
def demo(open_pipeline: OpenPipeline) -> ApiClient:
    return ApiClient(create_app(open_pipeline(), token=TOKEN))


def test_the_demo_model_comes_with_an_embedding_model(demo: ApiClient) -> None:
    assert [card["id"] for card in demo.get("/v1/models").get_json()["data"]] == [DEMO_NAME, DEMO_EMBEDDING_NAME]
    body = demo.post("/v1/embeddings", {"input": "How do I start the server?"}).get_json()
    assert body["model"] == DEMO_EMBEDDING_NAME
    of_chat = demo.post("/v1/embeddings", {"model": DEMO_NAME, "input": "How do I start the server?"}).get_json()
    assert len(body["data"][0]["embedding"]) == 512
    assert len(of_chat["data"][0]["embedding"]) == 192


def test_none_leaves_it_out(open_pipeline: OpenPipeline) -> None:
    client = ApiClient(create_app(open_pipeline(embeddings__model="none"), token=TOKEN))
    assert [card["id"] for card in client.get("/v1/models").get_json()["data"]] == [DEMO_NAME]
    assert client.post("/v1/embeddings", {"input": "a"}).get_json()["model"] == DEMO_NAME


def test_it_finds_passages_for_questions_that_it_was_never_trained_on(demo: ApiClient) -> None:
    split = retrieval.split()

    def served(texts: Sequence[str]) -> Any:
        data = demo.post("/v1/embeddings", {"model": DEMO_EMBEDDING_NAME, "input": list(texts)}).get_json()["data"]
        return np.array([each["embedding"] for each in data], dtype=np.float32)

    ours, _ = recall(served, split.new_wordings, split.passages)
    baseline, _ = recall(bag_of_words(split.passages), split.new_wordings, split.passages)
    assert len(split.new_wordings) > 100
    assert ours > 0.65
    assert ours > baseline + 0.15
    ours, among_five = recall(served, split.new_passages, split.passages)
    baseline, baseline_among_five = recall(bag_of_words(split.passages), split.new_passages, split.passages)
    assert len({passage for _, passage in split.new_passages}) > 30
    assert ours > baseline - 0.05 and among_five > baseline_among_five


def test_it_is_small_and_what_readers_are_told_of_it_is_there() -> None:
    assert sum(file.stat().st_size for file in DEMO_EMBEDDING_PATH.rglob("*")) < 4_000_000
    assert "recall@1" in (DEMO_EMBEDDING_PATH / "RETRIEVAL.md").read_text(encoding="utf-8")


def test_a_bert_without_layers_gives_the_rows_of_a_table() -> None:
    table = torch.randn(7, WIDTH - FILL, generator=torch.Generator().manual_seed(1)) * torch.arange(7)[:, None]
    hidden = as_bert(table)(input_ids=torch.arange(7)[None]).last_hidden_state[0].float()
    assert not hidden[:, -FILL:].any()
    factor = hidden[-1, 0] / table[-1, 0]
    torch.testing.assert_close(hidden[:, :-FILL], table * factor, rtol=4e-3, atol=4e-3)


def test_a_text_without_words_has_a_vector_of_length_one(demo: ApiClient) -> None:
    body = {"model": DEMO_EMBEDDING_NAME, "input": [" ", "word " * CONTEXT], "truncate_prompt_tokens": -1}
    for each in demo.post("/v1/embeddings", body).get_json()["data"]:
        assert np.linalg.norm(each["embedding"]) == pytest.approx(1, abs=1e-3)


def test_what_is_held_out_depends_on_the_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    split = retrieval.split()
    monkeypatch.setattr(retrieval.product, "USAGE", retrieval.product.USAGE[3:])
    fewer = retrieval.split()
    assert {passage for _, passage in fewer.new_passages} <= {passage for _, passage in split.new_passages}
    assert len(fewer.passages) == len(split.passages) - 3


def test_held_out_questions_are_in_no_training_batch() -> None:
    split = retrieval.split()
    held = {question.lower().rstrip(".?!") for question, _ in (*split.new_wordings, *split.new_passages)}
    stream = retrieval.batches(7, 64)
    asked = [text.lower().rstrip(".?!") for _ in range(60) for pair in next(stream) for text in pair[:2]]
    assert not held & set(asked)
    trained = {fact.answer for fact in split.facts}
    assert not {passage for _, passage in split.new_passages} & trained
