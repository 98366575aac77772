"""Health, metrics and the state of engine and machine."""

from __future__ import annotations

import pytest
from api_client import ApiClient
from fake_pipeline import FakePipeline
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from core.devices.readings import DeviceReading


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
    "path",
    [
        "/api/pipeline/status", "/api/queue/status", "/api/batcher/stats", "/api/gpu", "/api/system", "/api/nodes",
        "/api/tasks",
    ],
)  # fmt: skip
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
    assert first["discovery"] == {"status": "disabled", "address": None, "port": None}
    assert (first["left_out"], first["offer"]) == ([], None)
    assert len(first["nodes"]) == 1
    assert first["nodes"][0]["roles"] == ["api", "engine"]
    assert first["nodes"][0]["id"] == second["nodes"][0]["id"]
    assert first["nodes"][0]["devices"][0]["name"] == "cpu:0"


def test_a_device_has_its_last_reading(client: ApiClient, pipeline: FakePipeline) -> None:
    (device,) = client.get("/api/gpu").get_json()["devices"]
    assert (device["name"], device["limit_bytes"], device["used_bytes"], device["reading"]) == (
        "cpu:0",
        1024,
        512,
        None,
    )
    pipeline.monitor.readings = {"cpu:0": DeviceReading("cpu:0", utilization=0.5, throttling=("power limit",))}
    (device,) = client.get("/api/gpu").get_json()["devices"]
    assert device["reading"]["utilization"] == 0.5
    assert device["reading"]["throttling"] == ["power limit"]
    assert device["reading"]["temperature_c"] is None


def test_tasks_that_run_and_that_ended(client: ApiClient, pipeline: FakePipeline) -> None:
    assert client.get("/api/tasks").get_json() == {"running": [], "recent": []}
    tasks = pipeline.metrics.tasks
    with tasks.run("load", "owner/name"):
        (running,) = client.get("/api/tasks").get_json()["running"]
    assert (running["kind"], running["detail"], running["status"], running["error"]) == (
        "load", "owner/name", "running", None
    )  # fmt: skip
    body = client.get("/api/tasks").get_json()
    assert body["running"] == []
    assert [(task["id"], task["status"]) for task in body["recent"]] == [(running["id"], "completed")]


def test_moving_memory_is_a_task(client: ApiClient, pipeline: FakePipeline) -> None:
    assert client.post("/api/memory/blocks/00/promote").status_code == 404
    (task,) = pipeline.metrics.tasks.recent()
    assert (task.kind, task.detail, task.priority, task.resource, task.status) == (
        "promote", "00", "low", "memory", "refused"
    )  # fmt: skip


def test_latencies_of_late(client: ApiClient, pipeline: FakePipeline) -> None:
    pipeline.metrics.observe_first_token(0.25, 4, "r")
    latency = client.get("/api/batcher/stats").get_json()["latency"]
    assert latency["first_token"] == {"count": 1, "p50": 0.25, "p95": 0.25, "p99": 0.25}
    assert latency["request"] == {"count": 0, "p50": None, "p95": None, "p99": None}


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


@pytest.mark.parametrize("escaping", ["", "; escaping=underscores", "; escaping=allow-utf-8"])
def test_names_with_a_colon_keep_it_in_openmetrics(client: ApiClient, pipeline: FakePipeline, escaping: str) -> None:
    """Boards made for vLLM ask for them by these names."""
    pipeline.metrics.set_model("tiny")
    response = client.get("/metrics", headers={"Accept": f"application/openmetrics-text; version=1.0.0{escaping}"})
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    assert families["vllm:prompt_tokens"].samples[0].name == "vllm:prompt_tokens_total"
    names = {sample.name for family in families.values() for sample in family.samples}
    assert not [name for name in names if name.startswith("vllm_")]


@pytest.mark.parametrize(
    ("escaping", "name"), [("dots", "vramancer__infer__total"), ("values", "U__vramancer__infer__total")]
)
def test_a_scraper_may_ask_for_another_way_of_escaping(client: ApiClient, escaping: str, name: str) -> None:
    accept = f"application/openmetrics-text; version=1.0.0; escaping={escaping}"
    response = client.get("/metrics", headers={"Accept": accept})
    assert response.headers["Content-Type"].endswith(f"escaping={escaping}")
    assert f"\n{name} 0.0" in response.text
