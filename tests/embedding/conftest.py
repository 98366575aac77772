"""Pipelines that serve an encoder beside a tiny chat model, and clients of their API."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from api.api_client import TOKEN, ApiClient
from tiny_models import build_tiny

from core.api import create_app
from core.inference_pipeline import InferencePipeline


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    """A tiny decoder."""
    path = tmp_path / "chat"
    build_tiny("llama", path)
    return path


@pytest.fixture
def serve(open_pipeline: Callable[..., InferencePipeline], chat_model: Path) -> Callable[..., ApiClient]:
    """Serve with these settings of `embeddings`; returns a client, whose application knows the pipeline."""

    def start(**embeddings: object) -> ApiClient:
        settings = {f"embeddings__{name}": str(value) for name, value in embeddings.items()}
        return ApiClient(create_app(open_pipeline(chat_model, **settings), token=TOKEN))

    return start


def pipeline_of(client: ApiClient) -> InferencePipeline:
    found: InferencePipeline = client.raw.application.extensions["vramancer"].pipeline
    return found
