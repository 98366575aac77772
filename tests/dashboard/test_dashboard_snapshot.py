"""Differences, and the thread that looks."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from boards import ScriptedGateway
from hypothesis import given
from hypothesis import strategies as st
from steering import LONGEST_WAIT_S, until

from core.errors import UnavailableError
from dashboard import poller as poller_module
from dashboard.alerts import firing
from dashboard.gateway import ApiAnswer
from dashboard.live import sample
from dashboard.poller import THREAD_NAME, Poller
from dashboard.snapshot import SOURCES, Patch, Snapshot, Source, difference

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-2, 2) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=12,
)


def patched(state: Any, patch: Patch) -> Any:
    """As pages do it."""
    root = copy.deepcopy(state)
    for path, *value in copy.deepcopy(patch):
        if not path:
            root = value[0]
            continue
        at = root
        for key in path[:-1]:
            at = at[key]
        if value:
            at[path[-1]] = value[0]
        else:
            del at[path[-1]]
    return root


@given(VALUES, VALUES)
def test_a_difference_leads_from_one_to_the_other(old: Any, new: Any) -> None:
    patch = difference(old, new)
    assert json.dumps(patched(old, patch), sort_keys=True) == json.dumps(new, sort_keys=True)
    assert difference(new, new) == []


def test_a_difference_names_no_more_than_has_changed() -> None:
    old = {"a": {"b": [1, 2], "c": 3}, "d": 4}
    assert difference(old, {"a": {"b": [1, 5], "c": 3}, "e": 6}) == [[["d"]], [["a", "b", 1], 5], [["e"], 6]]
    assert difference({"a": 1}, {"a": True}) == [[["a"], True]], "in JSON, one is not true"
    assert difference({"a": [1]}, {"a": [1, 2]}) == [[["a"], [1, 2]]]


MEMORY = {
    "tiers": [{"mean_hotness": 0.123456, "hottest": [{"block": "ab", "hotness": 0.98765, "pinned": False}]}],
    "devices": [],
}


def test_what_nobody_sees_is_no_news() -> None:
    shaped = {source.name: source.shape for source in SOURCES}
    assert shaped["memory"](MEMORY)["tiers"][0]["hottest"] == [{"block": "ab", "hotness": 0.99, "pinned": False}]
    assert MEMORY["tiers"][0]["mean_hotness"] == 0.123456, "the answer itself stays as it is"
    assert shaped["pipeline"]({"memory": 1, "subsystems": 2, "stages": 3}) == {"stages": 3}


class Heard:
    """What a poller publishes."""

    def __init__(self) -> None:
        self.all: list[tuple[Snapshot, Patch]] = []
        self._came = threading.Condition()

    def __call__(self, snapshot: Snapshot, patch: Patch) -> None:
        with self._came:
            self.all.append((snapshot, patch))
            self._came.notify_all()

    def wait(self, number: int) -> Snapshot:
        with self._came:
            assert self._came.wait_for(lambda: len(self.all) >= number, LONGEST_WAIT_S)
            return self.all[number - 1][0]


@pytest.fixture
def heard() -> Heard:
    return Heard()


def poller_of(gateway: Any, heard: Heard, **options: Any) -> Iterator[Poller]:
    made = Poller(gateway, heard, **{"interval_s": 0.01, **options})
    made.start()
    yield made
    made.stop()
    made.join()


SMALL = (Source("queue", "/queue", 0.0), Source("tasks", "/tasks", 0.0))


def test_a_poller_looks_until_it_is_stopped(heard: Heard) -> None:
    gateway = ScriptedGateway({"/queue": {"running": 1}})
    for poller in poller_of(gateway, heard, sources=SMALL):
        heard.wait(3)
        assert any(thread.name == THREAD_NAME for thread in threading.enumerate())
        gateway.answers["/queue"] = {"running": 2}
        until(lambda: heard.all[-1][0]["queue"] == {"running": 2}, "news come")
        poller.stop()
        poller.join()
        asked = len(gateway.asked)
    assert len(gateway.asked) == asked
    assert not any(thread.name == THREAD_NAME for thread in threading.enumerate())
    state: Any = {}
    for snapshot, patch in heard.all:
        state = patched(state, patch)
        assert state == snapshot


def test_a_route_that_is_not_there_is_not_asked_for_each_time(heard: Heard) -> None:
    gateway = ScriptedGateway({"/queue": {}})
    for _ in poller_of(gateway, heard, sources=SMALL):
        heard.wait(5)
    assert gateway.asked.count("/tasks") == 1
    assert gateway.asked.count("/queue") >= 5
    assert heard.all[-1][0]["tasks"] is None


def test_a_server_that_goes_away_leaves_the_last_values_and_its_word(heard: Heard) -> None:
    gateway = ScriptedGateway({"/queue": {"running": 1}, "/tasks": {}})
    for _ in poller_of(gateway, heard, sources=SMALL):
        heard.wait(1)
        gateway.error = UnavailableError("no answer from there.")
        until(lambda: heard.all[-1][0]["trouble"] == "no answer from there.", "it says so")
        assert heard.all[-1][0]["queue"] == {"running": 1}
        gateway.error = None
        until(lambda: heard.all[-1][0]["trouble"] is None, "and comes back")


def test_an_answer_of_another_shape_does_not_end_the_thread(heard: Heard) -> None:
    gateway = ScriptedGateway({"/memory": {"other": 1}, "/queue": {}, "/text": ApiAnswer(200, {}, [b"no JSON"])})
    shape = next(source.shape for source in SOURCES if source.name == "memory")
    sources = (Source("memory", "/memory", 0.0, shape), Source("queue", "/queue", 0.0), Source("text", "/text", 0.0))
    for _ in poller_of(gateway, heard, sources=sources):
        heard.wait(3)
    assert heard.all[-1][0]["memory"] is None
    assert heard.all[-1][0]["queue"] == {}
    assert "other than JSON" in heard.all[-1][0]["trouble"]


class Prometheus(BaseHTTPRequestHandler):
    answer: Any = None

    def do_GET(self) -> None:
        assert self.path == "/api/v1/alerts"
        body = json.dumps(type(self).answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def prometheus() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Prometheus) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def alert(name: str, severity: str, state: str = "firing") -> dict[str, Any]:
    labels = {"alertname": name, "severity": severity, "gpu": "cuda:0"}
    return {
        "labels": labels,
        "annotations": {"summary": f"{name}!"},
        "state": state,
        "activeAt": "2026-01-01T00:00:00Z",
    }


def test_alerts_that_fire_are_shown_worst_first(prometheus: str, heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    told = [alert("B", "warning"), alert("C", "warning", "pending"), alert("A", "critical")]
    Prometheus.answer = {"status": "success", "data": {"alerts": told}}
    assert [(each["name"], each["severity"], each["summary"], each["labels"]) for each in firing(prometheus)] == [
        ("A", "critical", "A!", {"gpu": "cuda:0"}),
        ("B", "warning", "B!", {"gpu": "cuda:0"}),
    ]
    monkeypatch.setattr(poller_module, "ALERTS_EVERY_S", 0.0)
    for _ in poller_of(ScriptedGateway(), heard, sources=(), prometheus_url=prometheus):
        assert heard.wait(1)["alerts"]["firing"][0]["name"] == "A"
        Prometheus.answer = {"what": "ever"}
        until(lambda: heard.all[-1][0]["alerts"]["trouble"], "it says what is wrong")


def test_no_prometheus_is_no_trouble_of_the_server(heard: Heard, prometheus: str) -> None:
    for _ in poller_of(ScriptedGateway(), heard, sources=(), prometheus_url="http://127.0.0.1:1"):
        first = heard.wait(1)
    assert first["trouble"] is None
    assert "does not tell its alerts" in first["alerts"]["trouble"]


def test_a_point_of_the_curves_has_what_is_known() -> None:
    latency = {"first_token": {"p50": 0.1, "p95": 0.2, "p99": 0.3}, "between_tokens": {"p50": None}}
    batcher = {"tokens_per_second": 5.0, "running": 1, "waiting": 2, "latency": latency}
    assert sample({"time": 9.0, "batcher": batcher}) == [9.0, 5.0, 1, 2, 0.1, 0.2, 0.3, None, None, None]
    assert sample({"time": 9.0}) == [9.0] + [None] * 9
