"""`vramancer serve`: the API server."""

from __future__ import annotations

from core.config import Settings
from vramancer.cli.options import settings_command


@settings_command(
    "model", "devices", "engine", "lending", "memory", "backend", "api", "security", "cluster", "monitoring",
    "dashboard", "embeddings", "tracing", "logging", "runtime", model_argument=True,
    without=("cluster.master", "cluster.worker_port", "cluster.memory_bytes"),
)  # fmt: skip
def serve(settings: Settings) -> int:
    """Serve a model over the OpenAI-compatible API. Ctrl-C lets running requests finish; a second one exits at once."""
    from vramancer.server import serve as run_server

    return run_server(settings)
