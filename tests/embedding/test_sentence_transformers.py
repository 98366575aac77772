"""The same vectors as sentence-transformers itself, where it is installed (`pip install sentence-transformers`)."""

from __future__ import annotations

import importlib.util
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from api.api_client import ApiClient
from embedding.encoders import save_encoder, text, write

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None, reason="needs sentence-transformers"
)
NOISE = 2e-6
"""Of float32 sums in another order, for vectors of length 1."""
MODES = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def texts(count: int = 40) -> list[str]:
    rng = random.Random(5)
    return [text(*rng.choices(range(5, 96), k=rng.randint(1, 60))) for _ in range(count)]


def theirs(path: Path, given: list[str], **options: Any) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own dependencies
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(path), device="cpu", local_files_only=True)
        return np.asarray(model.encode(given, show_progress_bar=False, **options), dtype=np.float32)


def ours(client: ApiClient, given: list[str], **fields: Any) -> np.ndarray:
    body = {"input": given, "truncate_prompt_tokens": -1, **fields}
    data = client.post("/v1/embeddings", body).get_json()["data"]
    return np.array([each["embedding"] for each in data], dtype=np.float32)


def agree(found: np.ndarray, wanted: np.ndarray) -> None:
    scale = max(1.0, float(np.abs(wanted).max()))
    print(f"largest difference {np.abs(found - wanted).max() / scale:.1e}")
    np.testing.assert_allclose(found, wanted, atol=NOISE * scale)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("normalize", [True, False])
def test_pooling(serve: Callable[..., ApiClient], tmp_path: Path, kind: str, mode: str, normalize: bool) -> None:
    """Texts that are too long for the model among them, which both cut."""
    save_encoder(tmp_path / "encoder", mode, kind=kind, normalize=normalize)
    given = texts()
    agree(ours(serve(model=tmp_path / "encoder"), given), theirs(tmp_path / "encoder", given))


def test_several_poolings_behind_each_other(serve: Callable[..., ApiClient], tmp_path: Path) -> None:
    save_encoder(tmp_path / "encoder", pooling_mode_cls_token=True, pooling_mode_max_tokens=True)
    given = texts(8)
    found = ours(serve(model=tmp_path / "encoder"), given)
    agree(found, theirs(tmp_path / "encoder", given))
    assert found.shape == (8, 96)


@pytest.mark.parametrize("include_prompt", [True, False])
def test_prompts(serve: Callable[..., ApiClient], tmp_path: Path, include_prompt: bool) -> None:
    save_encoder(tmp_path / "encoder", include_prompt=include_prompt)
    write(tmp_path / "encoder", config_sentence_transformers={"prompts": {"query": "w40 w41 "}})
    given = texts(8)
    found = ours(serve(model=tmp_path / "encoder"), given, prompt_name="query")
    agree(found, theirs(tmp_path / "encoder", given, prompt_name="query"))
