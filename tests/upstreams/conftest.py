"""Fixtures: a server of ours (with a scripted engine) that has upstreams."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from api.api_client import TOKEN, ApiClient
from api.fake_pipeline import FakePipeline
from upstreams.servers import MODEL, NAME, Upstream, upstream

from core.api import create_app
from core.config import load_settings


class Ours:
    """A server of ours, its pipeline and a client."""

    def __init__(self, pipeline: FakePipeline) -> None:
        self.pipeline = pipeline
        self.app = create_app(pipeline)  # type: ignore[arg-type]
        self.client = ApiClient(self.app)

    @property
    def replicas(self) -> tuple[Any, ...]:
        return self.pipeline.upstreams.groups()[0].replicas


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[Callable[..., Ours]]:
    """Make one with these upstreams (as in the settings file), and settings of `backend`."""
    made: list[FakePipeline] = []

    def make(*upstreams: Any, production: bool = False, **backend: Any) -> Ours:
        environ = {"HOME": str(tmp_path), "VRM_API_TOKEN": TOKEN}
        keys = {f"backend.{name}": value for name, value in backend.items()}
        # Looked at when they are first asked, and then no more: tests say when.
        keys = {"backend.probe_interval_s": 3600.0, **keys, "backend.upstreams": list(upstreams)}
        config_file = tmp_path / "config.yaml"
        config_file.touch()
        pipeline = FakePipeline(load_settings(config_file, environ, keys))
        made.append(pipeline)
        return Ours(pipeline)

    yield make
    for pipeline in made:
        pipeline.upstreams.close()


@pytest.fixture
def other() -> Iterator[Upstream]:
    with upstream() as found:
        yield found


def entry(server: Upstream, **more: Any) -> dict[str, Any]:
    return {"name": NAME, "url": server.url, "model": MODEL, **more}
