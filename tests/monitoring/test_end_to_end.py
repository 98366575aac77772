"""Prometheus scrapes a real server that serves the demo model: rules load, panels have data, and its end is told."""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from alert_harness import Prometheus, Webhook, alertmanager, prometheus, until, webhook
from e2e.conftest import TOKEN, Server, free_port, start_server, stop_server
from known_metrics import COMING, FAMILIES, VLLM
from monitoring_files import as_grafana_asks, board, metric_names, panels, program

OF_CARDS = (
    "gpu_other_memory_bytes", "gpu_pcie_generation", "gpu_pcie_width", "gpu_power_limit_watts", "gpu_power_watts",
    "gpu_temperature_celsius", "gpu_throttled",
)  # fmt: skip
"""What a server without a card has nothing to say of."""
OF_CLUSTERS = ("fastpath_", "vtp_", "telemetry_")
"""What a server that is alone has nothing to say of."""


ROOMY = ("--devices", "cpu=128MiB,cpu=128MiB", "--kv-cache-tokens", "4096", "--profile-seconds", "0.1")
TIGHT = (
    "--devices", "cpu=12500000B,cpu=24000000B", "--layers", "3,3", "--profile-seconds", "0.1", "--max-model-len", "256",
    "--lend-ratio", "1", "--reclaim-threshold", "1", "--lending-extent-blocks", "8", "--host-bytes", "200000",
    "--disk-bytes", "400000", "--disk-min-free-bytes", "0",
)  # fmt: skip
"""The first device borrows from the second, blocks go through the tiers, and some are given up in the end."""


@dataclass(frozen=True)
class Watched:
    """Two servers, who watches them, and who is told. `instances` are the addresses of their metrics."""

    roomy: Server
    tight: Server
    instances: tuple[str, str]
    prometheus: Prometheus
    told: Webhook


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    program("prometheus"), program("alertmanager")
    directory = tmp_path_factory.mktemp("watched")
    ports = free_port(), free_port()
    instances = f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}"
    with contextlib.ExitStack() as opened:
        told = opened.enter_context(webhook())
        manager = opened.enter_context(alertmanager(directory, told.url))
        targets = [{"targets": list(instances)}]
        prom = opened.enter_context(prometheus(directory, targets, f"127.0.0.1:{manager.port}"))
        servers = []
        for name, port, flags in (("roomy", ports[0], ROOMY), ("tight", ports[1], TIGHT)):
            home = directory / name
            home.mkdir()
            server = start_server(home, "--metrics-port", str(port), "--disk-path", str(home / "kv"), *flags)
            opened.callback(stop_server, server)
            servers.append(server)
        yield Watched(servers[0], servers[1], instances, prom, told)


def ask(server: Server, prompt: str, *, give_up: bool = False) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    body = {"model": "vramancer-demo", "prompt": prompt, "max_tokens": 40, "ignore_eos": True, "stream": give_up}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    response = connection.getresponse()
    response.read(1 if give_up else None)
    connection.close()
    assert response.status == 200


def load(server: Server) -> None:
    """Requests beside each other, the same ones later again, and one whose client leaves."""
    prompts = [f"{number} " * 30 + "Once upon a time" for number in range(12)]
    with ThreadPoolExecutor(4) as clients:
        list(clients.map(lambda prompt: ask(server, prompt), prompts))
    ask(server, prompts[0])
    ask(server, "Once upon a time", give_up=True)


def scrapes(prom: Prometheus) -> int:
    return min(int(each["value"][1]) for each in prom.query("count_over_time(up[1h])"))


def test_panels_have_data(watched: Watched) -> None:
    prom = watched.prometheus
    until(lambda: len(prom.query('up{job="vramancer"} == 1')) == 2, "Prometheus scrapes both servers")
    for _ in range(2):  # a rate takes two scrapes, one before and one after
        load(watched.tight)
        seen = scrapes(prom)
        until(lambda seen=seen: scrapes(prom) > seen + 1, "another scrape")

    without: dict[str, list[str]] = {}
    for panel in panels(board()):
        for target in panel["targets"]:
            if not prom.query(as_grafana_asks(target["expr"])):
                without.setdefault(panel["title"], []).append(target["expr"])
    missing = {title: set().union(*map(metric_names, found)) for title, found in without.items()}
    absent = {f"vramancer_{name}" for name in (*OF_CARDS, *OF_CLUSTERS, *COMING)}
    unexplained = {
        title: names for title, names in missing.items()
        if not any(name.startswith(tuple(absent)) for name in names) and title != "Alerts over time"
    }  # fmt: skip
    assert not unexplained


def test_only_what_belongs_to_features_to_come_is_not_there(watched: Watched) -> None:
    shown = shown_names(watched.instances[1])
    named = set().union(*(metric_names(target["expr"]) for panel in panels(board()) for target in panel["targets"]))
    coming = {f"vramancer_{each}" for each in COMING}
    assert {base(name) for name in named - shown} == {base(name) for name in named} & coming
    assert {base(name) for name in shown if name.startswith("vramancer_")} >= {f"vramancer_{name}" for name in FAMILIES}


GIVEN_NAMES = {
    f"vramancer_{name} metric names should not contain abbreviated units"
    for name in ("batcher_throughput_tok_s", "lending_pool_capacity_gb", "throughput_predicted_tok_s")
}
"""What promtool would call otherwise, and users know by these names. vLLM's names have a colon, all of them."""


def test_promtool_finds_fault_with_given_names_alone(watched: Watched) -> None:
    with urllib.request.urlopen(f"http://{watched.instances[1]}/metrics", timeout=60) as answer:
        exposed = answer.read()
    checked = subprocess.run(["promtool", "check", "metrics"], input=exposed, capture_output=True, check=False)
    said = (checked.stdout + checked.stderr).decode().splitlines()
    colons = {
        line for line in said if line.startswith("vllm:") and line.endswith("metric names should not contain ':'")
    }
    assert set(said) - colons == GIVEN_NAMES
    assert len(colons) == len(VLLM)


def shown_names(instance: str) -> set[str]:
    """Metrics that a server shows, whether anything has been counted or not. Histograms by their parts."""
    with urllib.request.urlopen(f"http://{instance}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    found = set()
    for _, _, name, kind in (line.split(" ") for line in lines if line.startswith("# TYPE ")):
        parts = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        found |= {name + part for part in parts}
    return found


def base(name: str) -> str:
    for part in ("_bucket", "_sum", "_count"):
        name = name.removesuffix(part)
    return name


def test_the_rules_are_evaluated_without_errors(watched: Watched) -> None:
    prom = watched.prometheus
    until(lambda: "instance:vramancer_infer:rate5m" in prom.names(), "rules are evaluated")
    assert prom.unhealthy_rules() == []
    assert not [name for name in prom.names() if name.endswith("_created")], "they would double the series"


def test_a_server_that_serves_alerts_nobody_and_its_end_is_told(watched: Watched) -> None:
    """The last test here: the server is stopped."""
    prom, instance = watched.prometheus, watched.instances[0]

    def firing() -> set[str]:
        return {alert for server, alert in prom.firing() if server == instance}

    until(lambda: prom.query(f'up{{instance="{instance}"}} == 1'), "the server is scraped")
    until(lambda: not firing(), "its start is over")
    load(watched.roomy)
    seen = scrapes(prom)
    until(lambda: scrapes(prom) > seen + 2, "its alerts are evaluated")
    assert firing() == set()

    watched.told.told.clear()
    assert stop_server(watched.roomy) == 0
    until(lambda: (instance, "APIDown") in watched.told.alerts(), "its end is told")
    told = [alert for alert in watched.told.told if alert["labels"]["instance"] == instance]
    assert {alert["annotations"]["summary"] for alert in told} == {f"{instance} is down"}
    assert {alert["receiver"] for alert in told} == {"critical"}
