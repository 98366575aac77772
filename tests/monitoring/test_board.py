"""The Grafana board is what the code makes, asks for metrics that exist, and can be read."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from known_metrics import COMING, samples
from monitoring_files import BOARD, MONITORING, alerts, board, metric_names, panels, read_yaml

PROMISED = {
    "Inference overview": {
        "Throughput", "Request latency", "Error rate", "Active tasks", "Request rate", "Latency distribution",
    },
    "GPU memory and utilisation": {
        "Memory of each device", "Transfer operations", "Transfer bandwidth", "Tasks per resource",
    },
    "Memory tiering": {"Promotions", "Demotions", "Evictions", "Hotness of blocks", "Hierarchy moves"},
    "Network and fast path": {"Fast path rate", "Fast path latency", "Interface benchmark"},
    "API and health": {"Endpoint latency", "Task life cycle"},
    "Orchestrator and HA": {"Placements", "Migrations and rebalances", "Journal size", "Task percentiles"},
    "First token and tokens": {"Time to first token", "Time between tokens"},
    "Lending": {"Leases", "Who borrows from whom", "Memory asked back"},
    "Stages": {"Busy share of each stage", "Predicted and measured throughput"},
}  # fmt: skip


def sections() -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    title = ""
    for panel in board()["panels"]:
        if panel["type"] == "row":
            title = panel["title"]
            found[title] = list(panel["panels"])
        else:
            found[title].append(panel)
    return found


def expressions(panel: dict[str, Any]) -> list[str]:
    return [target["expr"] for target in panel["targets"]]


def test_the_file_is_what_the_code_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("grafana_foundation_sdk", reason="the SDK is for Python 3.11 and newer")
    from monitoring.grafana import generate

    assert generate.main(["--check"]) == 0, "run: python -m monitoring.grafana.generate"
    monkeypatch.setattr(generate, "BOARD", tmp_path / "board.json")
    assert generate.main(["--check"]) == 1
    assert generate.main([]) == 0
    assert (tmp_path / "board.json").read_bytes() == BOARD.read_bytes()


def test_the_promised_panels_are_there() -> None:
    found = {title: {panel["title"] for panel in inner} for title, inner in sections().items()}
    for title, names in PROMISED.items():
        assert names <= found[title]
    assert next(iter(found)) == "At a glance"


def test_panels_ask_for_metrics_that_exist() -> None:
    for panel in panels(board()):
        for expression in expressions(panel):
            assert metric_names(expression) <= samples(), panel["title"]
            assert metric_names(expression) or re.search(r"\b(up|ALERTS)\b", expression), panel["title"]


def test_every_query_is_of_the_chosen_servers_alone() -> None:
    for panel in panels(board()):
        for expression in expressions(panel):
            selectors = re.findall(r"\b(?:vramancer_\w+|up|ALERTS)(\{[^}]*\})?", expression)
            assert selectors and all('instance=~"$instance"' in each for each in selectors), expression


def test_panels_that_have_no_data_yet_say_so() -> None:
    for panel in panels(board()):
        named = set().union(*map(metric_names, expressions(panel)))
        comes_later = any(name.startswith(tuple(f"vramancer_{each}" for each in COMING)) for name in named)
        assert comes_later == ("come with a later version" in panel["description"]), panel["title"]


def test_every_panel_is_described_and_has_a_unit_and_legends() -> None:
    for panel in panels(board()):
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]


def test_ids_and_titles_are_each_panels_own() -> None:
    every = [inner for panel in board()["panels"] for inner in (panel, *panel.get("panels", ()))]
    for key in ("id", "title"):
        assert len({panel[key] for panel in every}) == len(every)


def test_panels_do_not_overlap() -> None:
    for inner in (board()["panels"], *(row["panels"] for row in board()["panels"] if row["type"] == "row")):
        places = [panel["gridPos"] for panel in inner]
        assert all(place["x"] + place["w"] <= 24 for place in places)
        for a, b in combinations(places, 2):
            beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
            assert beside or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]


def test_links_lead_to_the_panel_that_they_name() -> None:
    made = board()
    titles = {panel["id"]: panel["title"] for panel in panels(made)}
    links = [link for panel in panels(made) for link in panel.get("links", ())]
    assert len(links) > 15
    for link in links:
        found = re.match(rf"/d/{made['uid']}\?viewPanel=(\d+)&", link["url"])
        assert found is not None and titles[int(found[1])] == link["title"]


def test_servers_and_devices_can_be_chosen() -> None:
    variables = {each["name"]: each for each in board()["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    for name in ("instance", "gpu"):
        assert variables[name]["multi"] and variables[name]["includeAll"]
        assert metric_names(variables[name]["query"]) <= samples()


def test_alerts_are_marked_on_the_graphs() -> None:
    (marks,) = board()["annotations"]["list"]
    assert marks["expr"].startswith("ALERTS{") and 'alertstate="firing"' in marks["expr"]
    assert marks["titleFormat"] == "{{alertname}}"


def test_the_limits_that_panels_draw_are_those_of_the_alerts() -> None:
    from monitoring.grafana.board.limits import ALERT_LIMITS

    for name, limit in ALERT_LIMITS.items():
        factors = re.search(r"[<>] ([\d. *]+)", alerts()[name]["expr"].replace("[2m]) > 0", ""))
        assert factors is not None
        value = 1.0
        for factor in factors[1].split("*"):
            value *= float(factor)
        assert value == limit, name


def test_grafana_is_told_where_board_and_data_are() -> None:
    provisioning = MONITORING / "grafana" / "provisioning"
    (provider,) = read_yaml(provisioning / "dashboards" / "vramancer.yml")["providers"]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"
    sources = read_yaml(provisioning / "datasources" / "prometheus.yml")["datasources"]
    assert [source["type"] for source in sources if source.get("isDefault")] == ["prometheus"]
    assert {source["url"] for source in sources} == {"http://prometheus:9090", "http://alertmanager:9093"}


def test_prometheus_finds_servers_at_home_and_in_the_compose_network() -> None:
    config = read_yaml(MONITORING / "prometheus" / "prometheus.yml")
    (job,) = config["scrape_configs"]
    assert job["job_name"] == "vramancer"
    named = [
        *job["file_sd_configs"][0]["files"],
        *config["alerting"]["alertmanagers"][0]["file_sd_configs"][0]["files"],
    ]
    assert named == ["targets/vramancer.yml", "targets/alertmanager.yml"]
    for folder, hosts in (("targets", ("localhost", "localhost")), ("compose-targets", ("vramancer", "alertmanager"))):
        found = [read_yaml(MONITORING / "prometheus" / folder / Path(name).name)[0]["targets"] for name in named]
        assert found == [[f"{hosts[0]}:9108"], [f"{hosts[1]}:9093"]]
