"""Fixtures of the API's tests: a scripted pipeline, the application that serves it, and a client with the token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from api_client import TOKEN, ApiClient
from fake_pipeline import FakePipeline
from flask import Flask

from core.api import create_app
from core.config import load_settings
from core.parsers.families import OutputFormat


@pytest.fixture
def make_pipeline(tmp_path: Path) -> Callable[..., FakePipeline]:
    def make(**overrides: Any) -> FakePipeline:
        keys = {key.replace("__", "."): value for key, value in overrides.items()}
        environ = {"HOME": str(tmp_path), "VRM_API_TOKEN": TOKEN}
        config_file = tmp_path / "config.yaml"
        config_file.touch()
        return FakePipeline(load_settings(config_file, environ, keys))

    return make


@pytest.fixture
def pipeline(make_pipeline: Callable[..., FakePipeline]) -> FakePipeline:
    return make_pipeline()


@pytest.fixture
def thinker(pipeline: FakePipeline) -> FakePipeline:
    """Of a model that thinks and calls tools."""
    pipeline.fake_model = replace(pipeline.model, output_format=OutputFormat("hermes", "think"))
    return pipeline


@pytest.fixture
def app(pipeline: FakePipeline) -> Flask:
    return create_app(pipeline)  # type: ignore[arg-type]


@pytest.fixture
def client(app: Flask) -> ApiClient:
    return ApiClient(app)
