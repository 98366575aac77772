"""The program itself: what it sends before it ends."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

from e2e.conftest import TOKEN, start_server, stop_server
from tracing.collector import Collector


def test_ctrl_c_sends_what_is_left(collector: Collector, tmp_path: Path) -> None:
    server = start_server(
        tmp_path, "--devices", "cpu=256MiB", "--placement", "vram", VRM_TRACING="1", VRM_LOG_JSON="1",
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.url, OTEL_BSP_SCHEDULE_DELAY="3600000", OTEL_SERVICE_NAME="mine",
    )  # fmt: skip
    try:
        body = {"prompt": "Hello", "max_tokens": 4, "ignore_eos": True, "stream": True}
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        asked = urllib.request.Request(f"{server.url}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(asked, timeout=120) as answer:
            assert answer.read().endswith(b"[DONE]\n\n")
        assert collector.posts == 0
    finally:
        status = stop_server(server)
    log = server.log.read_text()
    assert status == 0, log[-3000:]
    request, decode, load = (collector.one(name) for name in ("POST /v1/completions", "decode", "task load"))
    assert request.holds(decode) and decode.attributes["gen_ai.usage.output_tokens"] == 4
    assert load.status == "unset" and load.resource["service.name"] == "mine"
    lines = [json.loads(line) for line in log.splitlines() if "request answered" in line]
    assert request.trace in [line.get("trace_id") for line in lines]
    assert "cannot be sent" not in log
