"""Vectors and scores are those of transformers alone, one text at a time, whatever they were batched with."""

from __future__ import annotations

import base64
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from api.api_client import ApiClient
from embedding.encoders import reference, save_encoder, save_reranker, text, write
from tiny_models import build_tiny
from transformers import AutoModel

NOISE = 2e-6
"""Of float32 sums in another order, for vectors of length 1."""
TEXTS = [[5, 6, 7, 8], [9], [10, 11, 12, 13, 14, 15, 16], [20, 21], [95, 5, 94, 6, 93, 7, 92, 8, 91, 9]]
Serve = Callable[..., ApiClient]


def embed(client: ApiClient, inputs: Any, **fields: Any) -> np.ndarray:
    response = client.post("/v1/embeddings", {"input": inputs, **fields})
    assert response.status_code == 200, response.text
    data = response.get_json()["data"]
    assert [each["index"] for each in data] == list(range(len(data)))
    return np.array([each["embedding"] for each in data], dtype=np.float32)


def framed(numbers: list[int]) -> list[int]:
    return [1, *numbers, 2]


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("mode", ["mean_tokens", "cls_token", "lasttoken", "max_tokens", "weightedmean_tokens"])
@pytest.mark.parametrize("normalize", [True, False])
def test_pooling_is_as_the_files_say(serve: Serve, tmp_path: Path, kind: str, mode: str, normalize: bool) -> None:
    model = save_encoder(tmp_path / "encoder", mode, kind=kind, normalize=normalize)
    client = serve(model=tmp_path / "encoder")
    found = embed(client, [text(*numbers) for numbers in TEXTS])
    for numbers, vector in zip(TEXTS, found, strict=True):
        wanted = reference(model, framed(numbers), mode, normalize=normalize).numpy()
        np.testing.assert_allclose(vector, wanted, atol=NOISE * max(1.0, float(np.abs(wanted).max())), rtol=1e-5)


def test_a_text_has_the_same_vector_whatever_it_is_batched_with(serve: Serve, tmp_path: Path) -> None:
    save_encoder(tmp_path / "encoder")
    client = serve(model=tmp_path / "encoder", max_batch_tokens=64)
    rng = random.Random(3)
    texts = [text(*rng.choices(range(5, 96), k=rng.randint(1, 40))) for _ in range(60)]
    together = embed(client, texts)
    alone = np.concatenate([embed(client, each) for each in texts])
    np.testing.assert_allclose(together, alone, atol=NOISE)
    assert np.abs(together[0] - together[1]).max() > 0.01


def test_token_ids_are_taken_as_they_are(serve: Serve, tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "encoder")
    client = serve(model=tmp_path / "encoder")
    np.testing.assert_allclose(embed(client, framed(TEXTS[0])), embed(client, text(*TEXTS[0])), atol=NOISE)
    one, other = embed(client, [TEXTS[0], TEXTS[1]])
    np.testing.assert_allclose(one, reference(model, TEXTS[0], "mean_tokens"), atol=NOISE)
    np.testing.assert_allclose(other, reference(model, TEXTS[1], "mean_tokens"), atol=NOISE)


def test_base64_is_the_same_numbers(serve: Serve, tmp_path: Path) -> None:
    save_encoder(tmp_path / "encoder")
    client = serve(model=tmp_path / "encoder")
    inputs = [text(*numbers) for numbers in TEXTS]
    plain = embed(client, inputs)
    body = client.post("/v1/embeddings", {"input": inputs, "encoding_format": "base64"}).get_json()
    packed = [np.frombuffer(base64.b64decode(each["embedding"]), dtype="<f4") for each in body["data"]]
    np.testing.assert_array_equal(plain, np.stack(packed))


def test_dimensions_cut_vectors_and_bring_them_to_length_1(serve: Serve, tmp_path: Path) -> None:
    save_encoder(tmp_path / "encoder", normalize=False)
    client = serve(model=tmp_path / "encoder")
    whole, cut = embed(client, text(*TEXTS[2])), embed(client, text(*TEXTS[2]), dimensions=12)
    assert cut.shape == (1, 12)
    np.testing.assert_allclose(cut[0], whole[0, :12] / np.linalg.norm(whole[0, :12]), atol=NOISE)


def test_prompts_stand_in_front_of_texts_and_are_pooled_only_where_the_files_say_so(
    serve: Serve, tmp_path: Path
) -> None:
    model = save_encoder(tmp_path / "encoder", include_prompt=False)
    prompts = {"query": "w40 w41 ", "plain": ""}
    write(tmp_path / "encoder", config_sentence_transformers={"prompts": prompts, "default_prompt_name": "plain"})
    client = serve(model=tmp_path / "encoder")
    (asked,) = embed(client, text(5, 6), prompt_name="query")
    np.testing.assert_allclose(asked, reference(model, framed([40, 41, 5, 6]), "mean_tokens", skip=3), atol=NOISE)
    (without,) = embed(client, text(5, 6))
    np.testing.assert_allclose(without, reference(model, framed([5, 6]), "mean_tokens"), atol=NOISE)


def test_the_default_prompt_stands_in_front_of_texts(serve: Serve, tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "encoder")
    write(tmp_path / "encoder", config_sentence_transformers={"prompts": {"a": "w40 "}, "default_prompt_name": "a"})
    (found,) = embed(serve(model=tmp_path / "encoder"), text(5, 6))
    np.testing.assert_allclose(found, reference(model, framed([40, 5, 6]), "mean_tokens"), atol=NOISE)


def test_truncation_keeps_what_the_tokenizer_puts_around_a_text(serve: Serve, tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "encoder")
    client = serve(model=tmp_path / "encoder")
    long = list(range(5, 65))
    (found,) = embed(client, text(*long), truncate_prompt_tokens=-1)
    np.testing.assert_allclose(found, reference(model, framed(long[:46]), "mean_tokens"), atol=NOISE)
    (short,) = embed(client, text(*long), truncate_prompt_tokens=5)
    np.testing.assert_allclose(short, reference(model, framed(long[:3]), "mean_tokens"), atol=NOISE)


def test_a_decoder_as_embedding_model_pools_its_last_token(serve: Serve, tmp_path: Path) -> None:
    build_tiny("qwen3", tmp_path / "decoder", seed=4)
    model = AutoModel.from_pretrained(tmp_path / "decoder").eval()
    client = serve(model=tmp_path / "decoder")
    for numbers, vector in zip(TEXTS, embed(client, [text(*each) for each in TEXTS]), strict=True):
        np.testing.assert_allclose(vector, reference(model, numbers, "lasttoken"), atol=NOISE)


@pytest.mark.parametrize("mode", [None, "mean_tokens"])
def test_the_chat_model_itself_gives_embeddings(serve: Serve, chat_model: Path, mode: str | None) -> None:
    model = AutoModel.from_pretrained(chat_model).eval()
    if mode is not None:
        write(chat_model, **{"1_Pooling__config": {f"pooling_mode_{mode}": True}})
    client = serve()
    many = [[5 + number, *range(10, 10 + number % 7)] for number in range(40)]  # more than one group
    found = embed(client, [text(*each) for each in many])
    for numbers, vector in zip(many, found, strict=True):
        np.testing.assert_allclose(vector, reference(model, numbers, mode or "lasttoken"), atol=2e-5)


# -- pairs ------------------------------------------------------------------------------------------------------------

QUERY, DOCUMENTS = [5, 6], [[7, 8, 9], [10], [11, 12, 13, 14, 15]]


@torch.inference_mode()
def logit(model: Any, first: list[int], second: list[int]) -> float:
    ids = [1, *first, 2, *second, 2]
    types = [0] * (len(first) + 2) + [1] * (len(second) + 1)
    return float(model(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits[0, 0])


@pytest.mark.parametrize("activation", [None, "torch.nn.modules.linear.Identity"])
def test_a_reranker_scores_pairs(serve: Serve, tmp_path: Path, activation: str | None) -> None:
    more = {} if activation is None else {"sentence_transformers": {"activation_fn": activation, "version": "5"}}
    model = save_reranker(tmp_path / "reranker", **more)
    client = serve(reranker=tmp_path / "reranker")
    body = {"text_1": text(*QUERY), "text_2": [text(*each) for each in DOCUMENTS]}
    answer = client.post("/v1/score", body).get_json()
    wanted = [logit(model, QUERY, each) for each in DOCUMENTS]
    if activation is None:
        wanted = [float(torch.sigmoid(torch.tensor(each))) for each in wanted]
    np.testing.assert_allclose([each["score"] for each in answer["data"]], wanted, atol=1e-5)
    ranked = client.post("/v1/rerank", {"query": text(*QUERY), "documents": body["text_2"]}).get_json()["results"]
    order = sorted(range(3), key=lambda index: -wanted[index])
    assert [each["index"] for each in ranked] == order
    np.testing.assert_allclose([each["relevance_score"] for each in ranked], [wanted[i] for i in order], atol=1e-5)


def test_without_a_reranker_the_score_is_the_cosine_of_embeddings(serve: Serve, tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "encoder", normalize=False)
    prompts = {"query": "w40 ", "document": "w41 "}
    write(tmp_path / "encoder", config_sentence_transformers={"prompts": prompts})
    client = serve(model=tmp_path / "encoder")
    body = {"text_1": text(*QUERY), "text_2": [text(*each) for each in DOCUMENTS]}
    found = [each["score"] for each in client.post("/v1/score", body).get_json()["data"]]
    query = reference(model, framed([40, *QUERY]), "mean_tokens")
    wanted = [float(query @ reference(model, framed([41, *each]), "mean_tokens")) for each in DOCUMENTS]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_documents_that_are_too_long_are_cut_at_their_end(serve: Serve, tmp_path: Path) -> None:
    model = save_reranker(tmp_path / "reranker")
    client = serve(reranker=tmp_path / "reranker")
    long = list(range(5, 95))
    body = {"text_1": text(*QUERY), "text_2": text(*long), "truncate_prompt_tokens": 12}
    (found,) = client.post("/v1/score", body).get_json()["data"]
    assert found["score"] == pytest.approx(1 / (1 + np.exp(-logit(model, QUERY, long[:7]))), abs=1e-5)
