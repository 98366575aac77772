"""Health, metrics and the state of engine and machine."""

from __future__ import annotations

import pytest
from api_client import ApiClient
from fake_pipeline import FakePipeline


def test_live(client: ApiClient) -> None:
    assert client.get("/live").get_json() == {"status": "alive"}


def test_ready_follows_the_pipeline(client: ApiClient, pipeline: FakePipeline) -> None:
    assert client.get("/ready").status_code == 200
    pipeline.fake_model = None
    response = client.get("/ready")
    assert response.status_code == 503
    assert response.get_json() == {"status": "not_ready", "reason": "no model is loaded"}


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is low on nothing."""
    monkeypatch.setattr("core.views.health.LOW_DISK_BYTES", 0)
    monkeypatch.setattr("core.views.health.LOW_MEMORY_BYTES", 0)


@pytest.mark.parametrize(
    ("breaker", "status", "code"), [("closed", "ok", 200), ("half_open", "degraded", 200), ("open", "error", 503)]
)
@pytest.mark.usefixtures("roomy")
def test_health_names_what_is_wrong(
    client: ApiClient, pipeline: FakePipeline, breaker: str, status: str, code: int
) -> None:
    pipeline.engine.batcher.breaker.state = breaker
    response = client.get("/health")
    assert response.status_code == code
    body = response.get_json()
    assert body["status"] == status
    assert body["failed"] == (["engine"] if status == "error" else [])
    assert set(body["checks"]) == {"engine", "model", "devices", "memory", "kv_cache", "disk"}
    assert body["checks"]["engine"]["status"] == status
    assert "0 steps" in body["checks"]["engine"]["detail"] or breaker in body["checks"]["engine"]["detail"]


def test_health_gives_details_only_with_the_token(client: ApiClient, pipeline: FakePipeline) -> None:
    breaker = pipeline.engine.batcher.breaker
    breaker.state, breaker.last_error = "open", "a secret"
    assert "secret" in client.get("/health").text
    response = client.raw.get("/health")
    assert response.status_code == 503
    assert response.get_json()["failed"] == ["engine"]
    assert response.get_json()["checks"]["engine"] == {"status": "error"}
    assert "secret" not in response.text


@pytest.mark.parametrize(
    "path", ["/api/pipeline/status", "/api/queue/status", "/api/batcher/stats", "/api/gpu", "/api/system", "/api/nodes"]
)
def test_state_routes_answer(client: ApiClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 200
    assert response.is_json


def test_system_counts_bytes(client: ApiClient) -> None:
    body = client.get("/api/system").get_json()
    assert body["memory"]["total_bytes"] > body["memory"]["available_bytes"] > 0
    assert body["disk"]["free_bytes"] > 0
    assert body["process"]["resident_bytes"] > 0
    assert body["cpu"]["count"] >= 1


def test_nodes_is_this_node_alone(client: ApiClient) -> None:
    first, second = client.get("/api/nodes").get_json(), client.get("/api/nodes").get_json()
    assert first["discovery"] == {"status": "disabled"}
    assert first["nodes"][0]["id"] == second["nodes"][0]["id"]
    assert first["nodes"][0]["devices"][0]["name"] == "cpu:0"


def test_metrics_see_requests_by_rule(client: ApiClient) -> None:
    client.get("/v1/models/demo")
    client.get("/v1/models/nothing")
    client.get("/made/up")
    client.get("/api/gpu")
    client.raw.get("/api/gpu")
    text = client.get("/metrics").text
    count = "vramancer_api_latency_seconds_count"
    assert f'{count}{{method="GET",path="/v1/models/<path:name>",status="200"}} 1.0' in text
    assert f'{count}{{method="GET",path="/v1/models/<path:name>",status="404"}} 1.0' in text
    assert f'{count}{{method="GET",path="unmatched",status="404"}} 1.0' in text
    assert f'{count}{{method="GET",path="/api/gpu",status="401"}} 1.0' in text
    assert "vramancer_env_endpoint_hits_total 1.0" in text
    assert "made/up" not in text


def test_a_streams_latency_is_seen_when_it_ends(client: ApiClient) -> None:
    client.events("/v1/completions", {"prompt": "a"})
    assert 'path="/v1/completions",status="200"' in client.get("/metrics").text


def test_metrics_speak_openmetrics_too(client: ApiClient) -> None:
    response = client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert response.mimetype == "application/openmetrics-text"
    assert response.text.endswith("# EOF\n")
