"""The rules are those that are promised, name metrics that exist, fire on their fault and on nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from api.fake_pipeline import FakePipeline
from known_metrics import samples
from monitoring_files import GUIDE, MONITORING, RULE_TESTS, RULES, alerts, metric_names, read_yaml, recorded, run

from core.api import create_app
from core.config import load_settings

PROMISED = {
    "gpu": ["GPUMemoryHigh", "GPUMemoryCritical", "NoGPUMetrics"],
    "inference": ["HighInferenceErrorRate", "HighInferenceLatency", "InferenceLatencyCritical", "InferenceStopped"],
    "tasks": ["TaskQueueBacklog", "HighTaskFailureRate"],
    "api": ["APILatencyHigh", "APIDown"],
    "transfers": ["FastPathLatencyHigh", "GPUTransferBandwidthLow"],
    "ha": ["HAJournalLarge", "FrequentRebalancing", "HighMemoryEvictions"],
}
LONG_ROUTES = {
    "/v1/completions", "/v1/chat/completions", "/v1/batch/completions", "/v1/messages", "/v1/responses", "/api/chat",
    "/api/generate", "/api/infer", "/completion", "/infill", "/api/models/load", "/api/models/unload",
    "/api/pipeline/place", "/api/memory/blocks/<block>/promote", "/api/memory/blocks/<block>/demote",
    "/api/memory/reclaim", "/api/memory/lend", "/v1/embeddings", "/v1/rerank", "/v1/reranking", "/v2/rerank",
    "/v1/score", "/api/embed",
}  # fmt: skip
"""Routes that answer when tokens were generated or something was moved: APILatencyHigh leaves them out."""
QUICK_ROUTES = {
    "/apply-template", "/tokenize", "/detokenize", "/api/show", "/v1/messages/count_tokens",
    "/api/requests/<request_id>/cancel", "/v1/responses/<response_id>/cancel",
}  # fmt: skip


def test_there_are_the_promised_alerts_and_no_other() -> None:
    groups = read_yaml(RULES / "alerts.yml")["groups"]
    assert {group["name"]: [rule["alert"] for rule in group["rules"]] for group in groups} == PROMISED
    assert len(alerts()) == 16


def test_prometheus_takes_the_configuration_and_the_rules() -> None:
    checked = run("promtool", "check", "config", "--lint=all", "--lint-fatal", MONITORING / "prometheus/prometheus.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "2 rule files found" in checked.stdout


@pytest.mark.parametrize("file", sorted(RULE_TESTS.glob("*.yml")), ids=lambda file: file.stem)
def test_rules_do_what_their_tests_say(file: Path) -> None:
    tested = run("promtool", "test", "rules", file)
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_a_rule_that_is_wrong_is_found(tmp_path: Path) -> None:
    for folder in (RULES, RULE_TESTS):
        (tmp_path / folder.name).mkdir()
        for file in folder.glob("*.yml"):
            text = file.read_text(encoding="utf-8").replace("ratio > 0.97", "ratio > 0.99")
            (tmp_path / folder.name / file.name).write_text(text, encoding="utf-8")
    assert run("promtool", "test", "rules", tmp_path / "tests" / "gpu.yml").returncode == 1


@pytest.mark.parametrize("name", [name for names in PROMISED.values() for name in names])
def test_each_alert_has_a_test_in_which_it_fires_and_one_in_which_it_does_not(name: str) -> None:
    cases: list[dict[str, Any]] = [case for file in RULE_TESTS.glob("*.yml") for case in read_yaml(file)["tests"]]
    outcomes = [
        {bool(check["exp_alerts"]) for check in case["alert_rule_test"] if check["alertname"] == name}
        for case in cases
        if case["name"].startswith(name)
    ]
    assert any(True in outcome for outcome in outcomes), "none in which it fires"
    assert {False} in outcomes, "none in which it is silent throughout"


@pytest.mark.parametrize("name", alerts())
def test_an_alert_says_what_where_and_what_to_do(name: str) -> None:
    rule = alerts()[name]
    assert re.fullmatch(r"\d+[sm]", rule["for"])
    assert rule["labels"]["severity"] in ("warning", "critical")
    notes = rule["annotations"]
    assert set(notes) == {"summary", "description", "runbook"}
    assert notes["runbook"] == f"docs/monitoring.md#{name.lower()}"
    assert f"\n### {name}\n" in GUIDE.read_text(encoding="utf-8")
    assert "$labels.instance" in notes["summary"] and "$labels.instance" in notes["description"]
    for label in {"gpu", "path", "method", "op"} & set(re.findall(r"\w+", _labels(rule["expr"]))):
        assert f"$labels.{label}" in notes["summary"]
    if name not in ("NoGPUMetrics", "APIDown"):
        assert "$value" in notes["summary"] and "$value" in notes["description"]


def _labels(expression: str) -> str:
    """Labels by which the series of an alert differ, beside the server: the first part of a recorded name says them."""
    recorded_name = re.match(r"\s*instance_(\w+?):", expression)
    return recorded_name[1].replace("_", " ") if recorded_name else ""


def test_rules_name_metrics_that_exist() -> None:
    expressions = [*recorded().values(), *(rule["expr"] for rule in alerts().values())]
    named = set().union(*(metric_names(expression) for expression in expressions))
    assert len(named) > 20
    assert named <= samples() | set(recorded())


def test_every_recorded_name_is_explained_or_used() -> None:
    used = set().union(*(metric_names(rule["expr"]) for rule in alerts().values()))
    guide = GUIDE.read_text(encoding="utf-8")
    assert [name for name in recorded() if name not in used and f"`{name}`" not in guide] == []


def test_a_window_is_no_longer_than_the_alert_waits() -> None:
    """So one bad request never alerts. InferenceStopped and FrequentRebalancing say by themselves how long they look
    back."""

    def minutes(text: str) -> int:
        return max((int(found) for found in re.findall(r"\[(\d+)m\]", text)), default=0)

    for name, rule in alerts().items():
        if name in ("InferenceStopped", "FrequentRebalancing"):
            continue
        window = max([minutes(rule["expr"]), *(minutes(recorded().get(n, "")) for n in metric_names(rule["expr"]))])
        assert int(rule["for"].removesuffix("m")) >= window, name


def test_api_latency_leaves_out_routes_whose_answers_last(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    settings = load_settings(tmp_path / "config.yaml", {"HOME": str(tmp_path), "VRM_API_TOKEN": "for-tests-only"}, {})
    rules = list(create_app(FakePipeline(settings)).url_map.iter_rules())  # type: ignore[arg-type]
    pattern = re.search(r'path!~"([^"]+)"', alerts()["APILatencyHigh"]["expr"])
    assert pattern is not None
    paths = {rule.rule for rule in rules if not rule.alias}
    assert {path for path in paths if re.fullmatch(pattern[1], path)} == LONG_ROUTES
    posts = {rule.rule for rule in rules if not rule.alias and "POST" in (rule.methods or ())}
    assert posts == LONG_ROUTES | QUICK_ROUTES, "say of a new route whether its answers last"
