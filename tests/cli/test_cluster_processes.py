"""A master and a worker as users start them, with the README's commands, on loopback."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli.cluster_programs import Programs
from steering import until

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Programs]:
    made = Programs(tmp_path)
    yield made
    made.close()


def test_two_machines_serve_one_model_and_one_of_them_leaves(pair: Programs) -> None:
    master = pair.master("--devices", "cpu=1GiB")
    url = master.says(r"API +(http://127\.0\.0\.1:\d+)/v1")[1]
    at = master.says(r"workers are accepted at\s+(127\.0\.0\.1:\d+)")[1]
    command = master.says(r"VRM_CLUSTER_TOKEN=(\S+) (.*)python -m vramancer.main --cluster-worker")
    assert command[1] == pair.token, "it is shown once"
    before = pair.answer(url)
    worker = pair.worker(url.removeprefix("http://"), pair.token)  # the API says where its master is
    worker.says("joined")
    until(lambda: len(pair.ask(url, "/api/nodes")["nodes"]) == 2, "both")
    seen = pair.ask(url, "/api/nodes")
    assert [node["hostname"] for node in seen["nodes"]][1:] == ["attic"]
    assert f"{seen['discovery']['address']}:{seen['discovery']['port']}" == at
    moved = pair.ask(
        url, "/api/pipeline/place", {"devices": "cpu=1GiB,attic/cpu#0,attic/cpu#1", "placement": "balanced"}
    )
    assert [stage["device"] for stage in moved["stages"]] == ["cpu", "attic/cpu#0", "attic/cpu#1"]
    assert pair.answer(url) == before
    for path in ("/api/gpu", "/api/memory", "/api/system", "/api/queue/status", "/api/batcher/stats", "/api/tasks"):
        assert pair.ask(url, path), path
    assert pair.ask(url, "/health")["status"] == "ok"

    worker.process.send_signal(signal.SIGINT)
    assert worker.process.wait() == 0, worker.said
    worker.says("leaving: the layers here move to other devices first")
    assert pair.homes(url) == ["cpu"]
    assert pair.answer(url) == before
    master.process.send_signal(signal.SIGTERM)
    assert master.process.wait() == 0
    assert "Traceback" not in master.said + worker.said
    assert pair.token not in worker.said


def test_a_model_that_needs_a_machine_waits_for_it(pair: Programs) -> None:
    master = pair.master("--devices", "attic/cpu#0")
    master.says("waiting for machines: attic/cpu#0 is not in the cluster")
    url = master.says(r"API +(http://127\.0\.0\.1:\d+)/v1, which answers 503")[1]
    at = master.says(r"workers are accepted at\s+(127\.0\.0\.1:\d+)")[1]
    token = master.says(r"VRM_CLUSTER_TOKEN=(\S+) ")[1]
    assert pair.ask(url, "/live")["status"] == "alive"
    lacking = "attic/cpu#0 is not in the cluster"  # or it is tried once more just now
    until(lambda: lacking in pair.ask(url, "/ready", status=503)["reason"], "the reason")
    assert "vramancer-demo" not in {card["id"] for card in pair.ask(url, "/v1/models")["data"]}
    refused = pair.ask(url, "/v1/completions", {"model": "vramancer-demo", "prompt": "Once"}, status=503)["error"]
    assert "attic/cpu#0 is not in the cluster" in refused["message"] and refused["code"] == "model_not_loaded"
    pair.worker(at, token)
    master.says("is ready")
    assert master.said.count(f"VRM_CLUSTER_TOKEN={token}") == 1, "a new token is shown once"
    assert pair.homes(url) == ["attic/cpu#0"]
    assert pair.answer(url)


def test_a_server_that_waits_for_machines_stops_like_any_other(pair: Programs) -> None:
    master = pair.master("--devices", "attic/cpu#0")
    master.says("waiting for machines")
    master.process.send_signal(signal.SIGTERM)
    assert master.process.wait() == 0
    assert "Traceback" not in master.said


def test_a_server_that_waits_in_vain_says_what_is_wrong_and_ends(pair: Programs) -> None:
    """A machine comes, and then it shows that the model cannot be loaded at all."""
    master = pair.master("--devices", "attic/cpu#0", "--max-model-len", "1000000")
    master.says("waiting for machines")
    at = master.says(r"workers are accepted at\s+(127\.0\.0\.1:\d+)")[1]
    pair.worker(at, pair.token)
    assert master.process.wait() == 1
    master.says("error: ")


def test_a_wrong_token_is_said_and_ends_the_worker(pair: Programs) -> None:
    master = pair.master("--devices", "cpu=1GiB")
    at = master.says(r"workers are accepted at\s+(127\.0\.0\.1:\d+)")[1]
    worker = pair.worker(at, "not the token of this cluster".replace(" ", "-"))
    assert worker.process.wait() == 1
    worker.says(r"error: .*token")
    url = master.says(r"API +(http://127\.0\.0\.1:\d+)/v1")[1]
    assert len(pair.ask(url, "/api/nodes")["nodes"]) == 1


def test_a_cluster_that_encrypts_takes_in_who_does_too(pair: Programs) -> None:
    pytest.importorskip("cryptography", reason="certificates are made by the extra tls")
    master = pair.master("--devices", "cpu=1GiB", "--cluster-tls")
    token = master.says(r"VRM_CLUSTER_TOKEN=(\S+) VRM_CLUSTER_TLS=1 .*python -m vramancer.main --cluster-worker")[1]
    at = master.says(r"workers are accepted at\s+(127\.0\.0\.1:\d+)")[1]
    plain = pair.worker(at, token)
    assert plain.process.wait() == 1
    plain.says(r"error: .*the listener encrypts its connections and the caller does not \(cluster\.tls")
    assert "Traceback" not in plain.said
    url = master.says(r"API +(http://127\.0\.0\.1:\d+)/v1")[1]
    pair.worker(url.removeprefix("http://"), token, "--cluster-tls").says("joined")


def test_two_ctrl_c_leave_at_once(pair: Programs) -> None:
    master = pair.master("--devices", "attic/cpu#0")
    at = master.says(r"taking workers in .*address=(127\.0\.0\.1:\d+)")[1]
    worker = pair.worker(at, pair.token)
    master.says("is ready")
    worker.process.send_signal(signal.SIGINT)
    worker.says("once more to leave at once")
    master.says("a node cannot leave yet")
    worker.process.send_signal(signal.SIGINT)
    assert worker.process.wait() == 130
    master.says("requests wait for devices")
    url = master.says(r"API +(http://127\.0\.0\.1:\d+)/v1")[1]
    assert "attic/cpu#0" in json.dumps(pair.ask(url, "/health", status=503)), "it names what is missing"
