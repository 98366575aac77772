"""Health, metrics, and the state of the engine and of the machine. Nothing here changes anything."""

from __future__ import annotations

import os
import platform
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import psutil
from flask import Blueprint, Response, g, request
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.exposition import ALLOWUTF8

from core.api.body import json_response
from core.api.context import api_context
from core.engine.model_engine import ModelEngine
from core.security.access import policy
from core.security.admission import STOPPING_KEY
from core.views.devices import device_views
from core.views.health import health as health_of
from core.views.nodes import nodes_view
from core.views.render import render
from core.views.state import ServiceState
from core.views.status import batcher_view, pipeline_view, queue_view

blueprint = Blueprint("monitoring", __name__)

OPENMETRICS = "application/openmetrics-text"


def _now() -> tuple[ModelEngine | None, ServiceState]:
    """What views are made from."""
    pipeline = api_context().pipeline
    return pipeline.current_engine, pipeline.state()


@blueprint.get("/live")
@policy(public=True)
def live() -> Response:
    """The process answers. Of a cluster's master it is told where workers are taken in."""
    cluster = api_context().pipeline.cluster
    return json_response({"status": "alive"} | ({"cluster_port": cluster.address[1]} if cluster is not None else {}))


@blueprint.get("/ready")
@policy(public=True)
def ready() -> Response:
    """200 once the loaded model has really produced a token, else 503; 503 too while the server is stopping."""
    is_ready, reason = api_context().pipeline.ready()
    if request.environ.get(STOPPING_KEY):
        is_ready, reason = False, "the server is stopping"
    body = {"status": "ready" if is_ready else "not_ready", "reason": reason}
    return json_response(body, 200 if is_ready else 503)


@blueprint.get("/health")
@policy(public=True)
def health() -> Response:
    """503 when a check has status error. Without the token, checks are named but not described."""
    report = health_of(*_now())
    body = {**render(report), "failed": report.failed}
    if g.principal is None:
        body["checks"] = {name: {"status": check.status} for name, check in report.checks.items()}
    return json_response(body, 503 if report.status == "error" else 200)


@blueprint.get("/metrics")
@policy("viewer")
def metrics() -> Response:
    encode, content_type = _encoder(request.headers.get("Accept", ""))
    return Response(encode(api_context().pipeline.metrics.registry), content_type=content_type)


def _encoder(accept: str) -> tuple[Callable[[CollectorRegistry], bytes], str]:
    """What writes metrics as a scraper asks for it, and that form's media type.

    Our names need no escaping, and OpenMetrics allows the colon of `vllm:...`. The library would write it as `_` (as of
    0.26), and look at every character of every name to find out.
    """
    encode, content_type = choose_encoder(accept)
    if content_type.startswith(OPENMETRICS) and not content_type.endswith(("escaping=dots", "escaping=values")):
        encode = partial(cast("Callable[..., bytes]", encode), escaping=ALLOWUTF8)
    return encode, content_type


@blueprint.get("/api/pipeline/status")
@policy("viewer")
def pipeline_status() -> Response:
    return json_response(render(pipeline_view(*_now())))


@blueprint.get("/api/queue/status")
@policy("viewer")
def queue_status() -> Response:
    return json_response(render(queue_view(*_now())))


@blueprint.get("/api/batcher/stats")
@policy("viewer")
def batcher_stats() -> Response:
    return json_response(render(batcher_view(*_now())))


@blueprint.get("/api/gpu")
@policy("viewer")
def gpu_status() -> Response:
    """Every logical device, with its memory and utilisation."""
    context = api_context()
    context.pipeline.metrics.count_environment_hit()
    return json_response({"devices": render(device_views(*_now()))})


@blueprint.get("/api/tasks")
@policy("viewer")
def tasks() -> Response:
    """Work in the background, such as loading a model: what runs, oldest first, and what ended lately, last first."""
    log = api_context().pipeline.metrics.tasks
    return json_response({"running": render(log.running()), "recent": render(log.recent())})


@blueprint.get("/api/system")
@policy("viewer")
def system_status() -> Response:
    context = api_context()
    context.pipeline.metrics.count_environment_hit()
    memory = psutil.virtual_memory()
    disk_path = _existing(context.pipeline.settings.runtime.cache_dir)
    disk = psutil.disk_usage(str(disk_path))
    process = psutil.Process()
    body = {
        "hostname": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "read_only": context.pipeline.settings.security.read_only,
        "cpu": {
            "count": os.cpu_count(),
            "physical_count": psutil.cpu_count(logical=False),
            "utilization_percent": psutil.cpu_percent(interval=None),  # since the last time somebody asked
            "load_average": list(psutil.getloadavg()),
        },
        "memory": {
            "total_bytes": memory.total,
            "available_bytes": memory.available,
            "used_bytes": memory.used,
            "used_percent": memory.percent,
        },
        "disk": {
            "path": str(disk_path),
            "total_bytes": disk.total,
            "free_bytes": disk.free,
            "used_percent": disk.percent,
        },
        "process": {
            "pid": process.pid,
            "resident_bytes": process.memory_info().rss,
            "threads": process.num_threads(),
            "uptime_s": time.time() - process.create_time(),
        },
    }
    return json_response(body)


@blueprint.get("/api/nodes")
@policy("viewer")
def nodes() -> Response:
    """This machine, and those that have joined it."""
    api_context().pipeline.metrics.count_environment_hit()
    return json_response(render(nodes_view(*_now())))


def _existing(path: Path) -> Path:
    """The path, or its nearest parent that is there already."""
    return next(candidate for candidate in (path, *path.absolute().parents) if candidate.exists())
